"""Reading a checkpoint by name into whatever layout the engine has now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from xtrain import random_states
from xtrain.agree import together
from xtrain.checkpoint import layout
from xtrain.checkpoint.safe import safe_load
from xtrain.errors import CheckpointError
from xtrain.log import log_dist, logger
from xtrain.zero.flat import FlatGroup
from xtrain.zero.home import full_shape, home_of
from xtrain.zero.shards import ShardedGroup
from xtrain.zero.weights import custom_load, divided_parameters

if TYPE_CHECKING:
    from xtrain.engine import XtrainEngine


def _read_torch(directory: Path, manifest: dict[str, Any], name: str) -> Any:
    path = layout.verified(directory, manifest, name)
    try:
        return safe_load(path)
    except Exception as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from None


def _check_shapes(engine: XtrainEngine, manifest: dict[str, Any], directory: Path) -> None:
    saved = manifest["parameters"]
    for name, param in engine.module.named_parameters():
        shape = list(full_shape(param))
        if name in saved and saved[name]["shape"] != shape:
            raise CheckpointError(
                f"checkpoint {directory}: parameter {name!r} has shape {saved[name]['shape']}, "
                f"the model's has {shape}"
            )


class _Runs:
    """Reads runs of elements, opening and verifying each optimizer file once, when first needed."""

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._open: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = layout.verified(self.directory, self.manifest, name)
            try:
                self._open[name] = safe_open(str(path), framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from None
        return self._open[name]

    def kinds(self, parameter: str) -> list[str]:
        """Kinds of state stored for a parameter."""
        return list(dict.fromkeys(kind for _, kind, _, _ in self.manifest["runs"].get(parameter, [])))

    def dtype(self, kind: str, parameter: str) -> torch.dtype:
        """Dtype of the stored runs of a kind of state."""
        name, _, low, _ = next(run for run in self.manifest["runs"][parameter] if run[1] == kind)
        empty: torch.Tensor = self._file(name).get_slice(layout.run_key(kind, parameter, low))[:0]
        return empty.dtype

    def fill(self, out: torch.Tensor, kind: str, parameter: str, start: int) -> None:
        """Copy elements [start, start + len(out)) of a parameter's state into `out`."""
        stop, covered = start + out.numel(), 0
        for name, entry_kind, low, high in self.manifest["runs"].get(parameter, []):
            first, last = max(start, low), min(stop, high)
            if entry_kind != kind or first >= last:
                continue
            stored = self._file(name).get_slice(layout.run_key(kind, parameter, low))
            out[first - start : last - start].copy_(stored[first - low : last - low])
            covered += last - first
        if covered != out.numel():
            raise CheckpointError(
                f"checkpoint {self.directory} has {covered} of {out.numel()} elements of {kind} of {parameter!r}"
            )


class Weights:
    """The weights of a checkpoint by name: whole in one file, or in runs (ZeRO stage 3).

    Args:
        prefer: `layout.MASTER` takes the masters of all parameters that have any, in their dtype.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], prefer: str = layout.WEIGHT) -> None:
        self._prefer = prefer
        self._runs = _Runs(directory, manifest)
        self._file = safe_open(
            str(layout.verified(directory, manifest, layout.own_file(manifest, layout.MODEL))), framework="pt"
        )
        self._whole = set(self._file.keys())
        self._shapes = {name: entry["shape"] for name, entry in manifest["parameters"].items()}
        self._dtypes = {name: entry["dtype"] for name, entry in manifest["parameters"].items()}
        self.names = self._whole | {name for name in manifest["runs"] if self._kind(name) is not None}

    def _kind(self, name: str) -> str | None:
        kinds = self._runs.kinds(name)
        return next((kind for kind in (self._prefer, layout.WEIGHT, layout.MASTER) if kind in kinds), None)

    def has_master(self, name: str) -> bool:
        """Whether there is a master of the parameter."""
        return layout.MASTER in self._runs.kinds(name)

    def whole(self, name: str) -> torch.Tensor:
        """A whole tensor, in its shape."""
        master = self._prefer == layout.MASTER and self.has_master(name)
        if name in self._whole and not master:
            return self._file.get_tensor(name)
        shape = torch.Size(self._shapes[name])
        kind = self._kind(name)
        assert kind is not None
        dtype = self._runs.dtype(kind, name) if master else getattr(torch, self._dtypes[name])
        data = torch.empty(shape.numel(), dtype=dtype)
        self._runs.fill(data, kind, name, 0)
        return data.view(shape)

    def load_piece(self, name: str, group: ShardedGroup, member: int) -> None:
        """Set what this rank owns of a divided parameter."""
        if name in self._whole:
            group.store(member, self._file.get_tensor(name).to(group.device))
        elif (found := group.piece_of(member)) is not None:
            piece, _, _ = found
            kind = self._kind(name)
            assert kind is not None
            mine = torch.empty(piece.stop - piece.start, dtype=group.dtype)
            self._runs.fill(mine, kind, name, piece.start)
            group.shard[piece.shard_start : piece.shard_start + mine.numel()].copy_(mine)


def _load_module(
    engine: XtrainEngine,
    directory: Path,
    manifest: dict[str, Any],
    extra: dict[str, Any],
    strict: bool,
) -> None:
    """Load weights, buffers, and `extra`: entries of the state dictionary that are not tensors."""
    weights, divided = Weights(directory, manifest), divided_parameters(engine.module)
    for name in weights.names & divided.keys():
        weights.load_piece(name, divided[name].group, divided[name].member)
    tensors: dict[str, Any] = {name: weights.whole(name) for name in weights.names - divided.keys()}
    tensors.update(extra)
    missing, unexpected = engine.module.load_state_dict(tensors, strict=False)
    # A tied weight is stored under one of its names: it is missing only if none of them was stored.
    state = {n: t for n, t in engine.module.state_dict(keep_vars=True).items() if torch.is_tensor(t)}
    loaded = {_identity(state[name]) for name in state if name in weights.names}
    missing = [name for name in missing if name not in state or _identity(state[name]) not in loaded]
    if strict and (missing or unexpected):
        parts = [f"lacks {missing[0]!r}"] if missing else []
        parts += [f"has {unexpected[0]!r}, which the model lacks"] if unexpected else []
        count = len(missing) + len(unexpected)
        more = f" ({count} names differ in all)" if count > 1 else ""
        raise CheckpointError(
            f"checkpoint {directory} {' and '.join(parts)}{more}: load_module_strict=False ignores it"
        )


def _identity(tensor: torch.Tensor) -> int:
    """The same number for tensors that share their data, divided ones included."""
    return id(tensor) if home_of(tensor) is not None else tensor.data_ptr()


def _split(shard: torch.Tensor, group: FlatGroup) -> list[torch.Tensor]:
    return list(torch.split(shard, [master.numel() for master in group.masters]))


def _load_group(
    group: FlatGroup,
    optimizer: torch.optim.Optimizer,
    runs: _Runs,
    scalars: dict[str, Any],
    restore_masters: bool,
) -> None:
    """Restore the masters and the optimizer states of what this rank owns now.

    Args:
        restore_masters: False keeps the masters that were made from the weights.
    """
    kinds = dict.fromkeys(kind for name in group.names for kind in runs.kinds(name))
    kinds.pop(layout.WEIGHT, None)
    elements = sum(master.numel() for master in group.masters)
    if len(kinds) == 1:  # written before the first step: what has come since is of another run
        for master in group.masters:
            optimizer.state.pop(master, None)
    for kind in kinds:
        if kind == layout.MASTER and not restore_masters:
            continue
        shard = torch.zeros(elements, dtype=group.masters[0].dtype)  # padding stays zero
        for piece in group.layout.pieces(group.partition):
            length = piece.stop - piece.start
            runs.fill(
                shard[piece.shard_start : piece.shard_start + length],
                kind,
                group.names[piece.member],
                piece.start,
            )
        for master, values in zip(group.masters, _split(shard, group), strict=True):
            if kind == layout.MASTER:
                master.data.copy_(values)
            else:
                optimizer.state[master][kind] = values.to(master.device, copy=True)
    if len(kinds) > 1:
        options = optimizer.param_groups[group.group_index]
        # torch's fused and capturable kernels count steps on the device.
        on_device = options.get("fused") or options.get("capturable")
        for master in group.masters:
            for kind, value in scalars.items():
                if torch.is_tensor(value):
                    value = value.to(master.device if on_device else "cpu", copy=True)
                optimizer.state[master][kind] = value


def _load_optimizer(
    engine: XtrainEngine, directory: Path, manifest: dict[str, Any], state: dict[str, Any]
) -> None:
    assert engine.optimizer is not None
    optimizer = engine.optimizer.optimizer
    saved = state.get("optimizer")
    if saved is None:
        raise CheckpointError(
            f"checkpoint {directory} has no optimizer states: pass load_optimizer_states=False"
        )
    if saved["type"] != type(optimizer).__name__:
        raise CheckpointError(
            f"checkpoint {directory} was written with {saved['type']}, this run uses {type(optimizer).__name__}: "
            "use the same optimizer or pass load_optimizer_states=False"
        )
    if len(saved["options"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"checkpoint {directory} has {len(saved['options'])} parameter groups, "
            f"this run has {len(optimizer.param_groups)}"
        )
    for group, options in zip(optimizer.param_groups, saved["options"], strict=True):
        group.update(options)
    engine.optimizer.loss_scaler.load_state_dict(saved["loss_scale"])
    runs = _Runs(directory, manifest)
    steps = saved["scalars"]
    # DeepSpeed reads the key in the ZeRO stages alone.
    restore_masters = engine.zero_optimization_stage() == 0 or engine.zero_load_from_fp32_weights()
    for flat in engine.optimizer.groups:
        scalars: dict[str, Any] = next(
            (steps[name] for name in flat.names if name in steps), next(iter(steps.values()), {})
        )
        _load_group(flat, optimizer, runs, scalars, restore_masters)


def _load_rng(engine: XtrainEngine, directory: Path, manifest: dict[str, Any]) -> None:
    if manifest["ranks"] != engine.world_size:
        log_dist(
            f"checkpoint was written by {manifest['ranks']} ranks, this run has {engine.world_size}: "
            "random-number states (dropout) are not restored",
            ranks=[0],
        )
        return
    states = _read_torch(directory, manifest, layout.rng_file(engine.global_rank, engine.world_size))
    torch.set_rng_state(states["torch"])
    random_states.tracker.set_states({**random_states.tracker.get_states(), **states.get("named", {})})
    written_on = states.get("device_type", "cpu")
    if written_on == engine.device.type:
        engine.backend.runtime.set_rng_state(states["device"])
    else:
        log_dist(
            f"checkpoint was written on a device of type {written_on!r}, this run's is {engine.device.type!r}: the "
            "device's random-number state (dropout) is not restored",
            ranks=[0],
        )


def _load_counters(engine: XtrainEngine, state: dict[str, Any]) -> None:
    engine.global_steps = state["global_steps"]
    engine.global_samples = state["global_samples"]
    engine.skipped_steps = state["skipped_steps"]
    # Counted in windows of the present size, which may differ from the one that wrote it.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def load(
    engine: XtrainEngine,
    load_dir: str | Path,
    tag: str | None,
    strict: bool,
    optimizer_states: bool,
    scheduler_states: bool,
    counters: bool,
    custom_load_fn: Callable[..., None] | None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Load `load_dir/tag` (None: what `latest` names); see XtrainEngine.load_checkpoint."""
    found = layout.find_tag(Path(load_dir), tag)
    if found is None:
        logger.warning("no checkpoint in %s yet: starting from the model as it is", load_dir)
        return None, None
    directory = Path(load_dir) / found

    state: dict[str, Any] = {}
    if engine.partition.gatherer is not None:
        engine.partition.gatherer.release_unused()

    manifest: dict[str, Any] = {}
    whole: dict[str, Any] = {}  # for custom_load_fn

    def read_module() -> None:
        model = engine.grid.model
        whole_manifest = layout.read_manifest(directory)
        manifest.update(
            layout.select_part(whole_manifest, directory, model.rank, model.tensor, model.pipeline)
        )
        _check_shapes(engine, manifest, directory)
        state.update(_read_torch(directory, manifest, layout.own_file(manifest, layout.STATE)))
        extra = state.get("module_extra", {})
        if custom_load_fn is None:
            _load_module(engine, directory, manifest, extra, strict)
        else:
            weights = Weights(directory, manifest)
            whole.update({name: weights.whole(name) for name in weights.names}, **extra)

    def read_states() -> None:
        for group in engine.partition.trained:
            group.refresh_masters()
        if engine.optimizer is not None and optimizer_states:
            _load_optimizer(engine, directory, manifest, state)
        if engine.lr_scheduler is not None and scheduler_states and "lr_scheduler" in state:
            engine.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if engine.optimizer is not None:
            engine.optimizer.zero_grad()  # gradients in flight belong to the weights that were replaced
        if counters:
            _load_counters(engine, state)
            _load_rng(engine, directory, manifest)

    what = f"loading checkpoint {directory}"
    together(read_module, what, CheckpointError)
    if custom_load_fn is not None:
        custom_load(engine.module, whole, custom_load_fn)
    together(read_states, what, CheckpointError)
    if engine.optimizer is not None and optimizer_states:
        engine.optimizer.publish()
    log_dist(f"loaded checkpoint {directory}", ranks=[0])
    return str(directory), state["client_state"]
