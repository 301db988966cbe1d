"""Writing a checkpoint: every rank its part into a temporary folder, then one rename."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from xtrain import comm, random_states
from xtrain.agree import together
from xtrain.buffers import storable
from xtrain.checkpoint import layout
from xtrain.checkpoint.safe import safe_load
from xtrain.errors import CheckpointError, ConfigError
from xtrain.files import sha256, sync_directory, write_text
from xtrain.log import log_dist
from xtrain.version import __version__
from xtrain.zero.flat import FlatGroup
from xtrain.zero.home import full_shape
from xtrain.zero.weights import divided_parameters

if TYPE_CHECKING:
    from xtrain.engine import XtrainEngine


def _owned_states(
    engine: XtrainEngine, exclude_frozen: bool
) -> tuple[dict[str, torch.Tensor], dict[str, list[list[Any]]]]:
    """This rank's runs by key, and for each parameter the [kind, start, stop] of its runs."""
    tensors: dict[str, torch.Tensor] = {}
    index: dict[str, list[list[Any]]] = {}

    def add(group: FlatGroup, kind: str, shard: torch.Tensor) -> None:
        for piece in group.layout.pieces(group.partition):
            name, length = group.names[piece.member], piece.stop - piece.start
            if exclude_frozen and not group.members[piece.member].requires_grad:
                continue
            run = shard[piece.shard_start : piece.shard_start + length]
            tensors[layout.run_key(kind, name, piece.start)] = run.detach().cpu().clone()
            index.setdefault(name, []).append([kind, piece.start, piece.stop])

    for group in engine.optimizer.groups if engine.optimizer is not None else ():
        assert engine.optimizer is not None
        for kind, shard in _sharded_states(group, engine.optimizer.optimizer).items():
            add(group, kind, shard)
    for group in engine.partition.sharded:
        # Where a master has the same dtype, it is the weight.
        if not group.masters or group.masters[0].dtype != group.dtype:
            add(group, layout.WEIGHT, group.shard)
    return tensors, index


def _is_sharded(value: Any, group: FlatGroup) -> bool:
    """Whether an optimizer state has one value for each element of a master slice."""
    return torch.is_tensor(value) and value.shape == group.masters[0].shape


def _sharded_states(group: FlatGroup, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The masters and each tensor state of the optimizer, as whole shards in shard order."""
    kinds = {"master": [master.data for master in group.masters]}
    first = optimizer.state.get(group.masters[0], {})
    for kind, value in first.items():
        if _is_sharded(value, group):
            kinds[kind] = [optimizer.state[master][kind] for master in group.masters]
    return {kind: group.assemble(slices) for kind, slices in kinds.items()}


def _scalar_states(group: FlatGroup, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of the optimizer that is not one value an element (step counts), the same on every rank."""
    first = optimizer.state.get(group.masters[0], {})
    scalars = {kind: value for kind, value in first.items() if not _is_sharded(value, group)}
    return {kind: value.cpu() if torch.is_tensor(value) else value for kind, value in scalars.items()}


def _state(engine: XtrainEngine, client_state: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {
        "global_steps": engine.global_steps,
        "micro_steps": engine.micro_steps,
        "global_samples": engine.global_samples,
        "skipped_steps": engine.skipped_steps,
        "client_state": client_state,
    }
    if engine.optimizer is not None:
        optimizer = engine.optimizer
        state["optimizer"] = {
            "type": type(optimizer.optimizer).__name__,
            "loss_scale": optimizer.loss_scaler.state_dict(),
            "options": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            "scalars": {
                group.names[0]: _scalar_states(group, optimizer.optimizer) for group in optimizer.groups
            },
        }
    extra = {
        name: value.detach().cpu() if torch.is_tensor(value) else value
        for name, value in engine.module.state_dict().items()
        if not (torch.is_tensor(value) and storable(value))
    }
    if extra:
        state["module_extra"] = extra
    if hasattr(engine.lr_scheduler, "state_dict"):
        state["lr_scheduler"] = engine.lr_scheduler.state_dict()
    return state


def _module_tensors(engine: XtrainEngine, exclude_frozen: bool) -> dict[str, torch.Tensor]:
    frozen = (
        {name for name, p in engine.module.named_parameters() if not p.requires_grad}
        if exclude_frozen
        else set()
    )
    elsewhere = frozen | divided_parameters(engine.module).keys()
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, torch.Size, Any], str] = {}
    for name, value in engine.module.state_dict().items():
        if not (torch.is_tensor(value) and storable(value)) or name in elsewhere:
            continue
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and key in seen:
            continue  # a tied weight: safetensors stores it once, the model ties it again when loading
        seen[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    return tensors


def _write_torch(value: Any, path: Path, what: str) -> None:
    """torch.save, refusing what could not be read back without executing code."""
    try:
        torch.save(value, path)
    except Exception as error:
        raise ValueError(f"{what} holds an object that cannot be saved: {error}") from None
    try:
        safe_load(path)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{what} holds an object that cannot be read back safely; use numbers, strings, lists, "
            f"dictionaries and tensors ({reason})"
        ) from None


def _write_part(
    engine: XtrainEngine, directory: Path, client_state: dict[str, Any], exclude_frozen: bool
) -> dict[str, Any]:
    """Write this rank's files; return their manifest entries, the index of runs, and what parameters there are."""
    model = engine.grid.model
    written: list[str] = []
    index: dict[str, list[list[Any]]] = {}
    parameters: dict[str, Any] = {}
    if engine.grid.rank == 0:
        weights, state = (
            layout.part_of(name, model.rank, model.size) for name in (layout.MODEL, layout.STATE)
        )
        save_file(_module_tensors(engine, exclude_frozen), directory / weights)
        _write_torch(_state(engine, client_state), directory / state, "client_state or the scheduler's state")
        written += [weights, state]
        parameters = {
            name: {"shape": list(full_shape(param)), "dtype": str(param.dtype).removeprefix("torch.")}
            for name, param in engine.module.named_parameters()
        }
    # In stage 0 every rank owns the same states: the first data-parallel rank writes them.
    partitioned = engine.zero_optimization()
    has_states = engine.optimizer is not None or bool(engine.partition.sharded)
    if has_states and (partitioned or engine.grid.rank == 0):
        name = layout.optimizer_file(engine.grid.rank, engine.grid.size if partitioned else 1)
        name = layout.part_of(name, model.rank, model.size)
        tensors, index = _owned_states(engine, exclude_frozen)
        save_file(tensors, directory / name)
        index = {parameter: [[name, *run] for run in runs] for parameter, runs in index.items()}
        written.append(name)
    rng = layout.rng_file(engine.global_rank, engine.world_size)
    states = {
        "torch": torch.get_rng_state(),
        "device": engine.backend.runtime.get_rng_state(),
        "device_type": engine.device.type,
        "named": random_states.tracker.get_states(),
    }
    _write_torch(states, directory / rng, "the random-number state")
    written.append(rng)
    files = {}
    for name in written:
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
    return {"files": files, "part": model.rank, "parameters": parameters, "runs": index}


def _merge(parts: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """`parameters` and `runs` of one model-parallel rank, from what the ranks have written."""
    parameters: dict[str, Any] = {}
    runs: dict[str, list[list[Any]]] = {}
    for part in parts:
        if part["part"] == number:
            parameters.update(part["parameters"])
            for parameter, entries in part["runs"].items():
                runs.setdefault(parameter, []).extend(entries)
    return {"parameters": parameters, "runs": runs}


def _publish(
    engine: XtrainEngine, temporary: Path, target: Path, parts: list[dict[str, Any]], latest: bool
) -> None:
    model = engine.grid.model
    manifest = {
        "format": layout.FORMAT,
        "version": layout.VERSION,
        "xtrain": __version__,
        "global_steps": engine.global_steps,
        "ranks": engine.world_size,
        "data_parallel_ranks": engine.grid.size,
        "zero_stage": engine.zero_optimization_stage(),
        "files": {name: entry for part in parts for name, entry in sorted(part["files"].items())},
        **_merge(parts, 0),
    }
    if model.size > 1:
        manifest["model_parallel"] = {"tensor": model.tensor, "pipeline": model.pipeline}
        manifest["parts"] = [_merge(parts, number) for number in range(model.size)]
        manifest.update(parameters={}, runs={})  # they stand in the parts
    write_text(temporary / layout.MANIFEST, json.dumps(manifest, indent=1))
    sync_directory(temporary)
    if target.exists():
        # rename cannot replace a folder that has files: the old one steps aside first.
        # Until the second rename, find_tag finds both under their hidden names.
        old = target.with_name(layout.leftovers(target.name)[1])
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old)
    else:
        temporary.rename(target)
    sync_directory(target.parent)
    if latest:
        write_text(target.parent / layout.LATEST, target.name)


def _check_tag(engine: XtrainEngine, tag: str) -> str:
    """Rank 0's tag, after comparing it with the others as `checkpoint.tag_validation` says."""
    tags = [""] * engine.world_size
    comm.all_gather_object(tags, tag)
    if not tags[0] or "/" in tags[0] or tags[0].startswith("."):
        raise CheckpointError(
            f"checkpoint tag {tags[0]!r} must be a plain name, without '/' and not starting with '.'"
        )
    if len(set(tags)) > 1:
        message = f"ranks gave different checkpoint tags: {', '.join(sorted(set(tags)))}"
        mode = engine.xtrain_config.values.checkpoint.tag_validation
        if mode == "Fail":
            raise ConfigError(message)
        if mode == "Warn":
            log_dist(f"{message}; using {tags[0]!r}", ranks=[0])
    return tags[0]


def save(
    engine: XtrainEngine,
    save_dir: str | Path,
    tag: str,
    client_state: dict[str, Any],
    save_latest: bool,
    exclude_frozen: bool,
) -> Path:
    """Write the checkpoint `save_dir/tag`; collective over all ranks.

    Raises:
        CheckpointError: on every rank, when any rank could not write its part; what existed stays.
    """
    tag = _check_tag(engine, tag)
    target = Path(save_dir) / tag
    temporary = target.with_name(layout.leftovers(tag)[0])
    first = engine.global_rank == 0

    def prepare() -> None:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            stale = target.with_name(layout.leftovers(tag)[1])
            if target.exists():
                shutil.rmtree(stale, ignore_errors=True)

    what = f"saving checkpoint {target}"
    together(prepare, what, CheckpointError)
    parts = together(
        lambda: _write_part(engine, temporary, client_state, exclude_frozen), what, CheckpointError
    )
    together(
        lambda: _publish(engine, temporary, target, parts, save_latest) if first else None,
        what,
        CheckpointError,
    )
    log_dist(f"saved checkpoint {target}", ranks=[0])
    return target
