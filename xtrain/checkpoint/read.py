"""Reading a checkpoint by name into whatever layout the engine has now: found, verified, then applied."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xtrain.activation_checkpointing import random_states
from xtrain.base.errors import CheckpointError, ConfigError
from xtrain.base.files import sha256
from xtrain.base.log import log_dist, logger
from xtrain.checkpoint import contents
from xtrain.checkpoint.fragments import Fragments
from xtrain.checkpoint.loads import Load, Loads
from xtrain.checkpoint.verify import Staged, Wanted, prefixes_apart, refuse_names, verify
from xtrain.zero import names
from xtrain.zero.buffers import make_room
from xtrain.zero.flat import FlatGroup
from xtrain.zero.train_state import TrainState
from xtrain.zero.weights import custom_load, sharded_parameters

NOTHING = ("nothing", "nothing")


def _find(load_dir: str | Path, tag: str | None, wanted: Wanted) -> tuple[Path | None, tuple[str, str]]:
    """The checkpoint's folder, None when there is none yet; and what the ranks compare and say about it."""
    if not isinstance(load_dir, str | os.PathLike) or not str(load_dir):
        raise ConfigError(f"load_dir must be the path of a folder, got {load_dir!r}")
    folder = Path(load_dir)
    if tag is None and (contents.is_empty(folder) or contents.latest_tag(folder) is None):
        newest = contents.complete_tags(folder)
        hint = (
            f"; the newest checkpoint in it is {newest[-1]!r}: pass tag={newest[-1]!r} to load it"
            if newest
            else ""
        )
        logger.warning(
            "no file %s: no checkpoint is loaded, training starts from the model as it is%s",
            folder / contents.LATEST,
            hint,
        )
        return None, NOTHING
    found = contents.find_tag(folder, None if tag is None else str(tag))
    assert found is not None
    directory = folder / found
    digest = sha256(directory / contents.MANIFEST)
    return directory, (
        f"{digest}{wanted.describe()}",
        f"{directory} (manifest {digest[:8]}){wanted.describe()}",
    )


def load(
    train_state: TrainState,
    loads: Loads,
    load_dir: str | Path,
    tag: str | None,
    wanted: Wanted,
    custom_load_fn: Callable[..., None] | None,
) -> tuple[str | None, dict[str, Any] | None]:
    """Load `load_dir/tag` (None: what `latest` names); see XtrainEngine.load_checkpoint."""
    gathers = custom_load_fn is not None and bool(sharded_parameters(train_state.module))
    call = loads.begin(wait=gathers)
    if gathers and not call.agreed:
        raise CheckpointError(
            "load_checkpoint(custom_load_fn=...) gathers the parameters in ZeRO stage 3: all ranks must call it at "
            "the same time"
        )
    mine: list[tuple[Path | None, tuple[str, str]]] = []

    def find() -> tuple[str, str]:
        mine[:] = [_find(load_dir, tag, wanted)]
        return mine[0][1]

    call.compare(call.run(find, f"looking for a checkpoint in {load_dir}"))
    directory, (compared, said) = mine[0]
    if directory is None:
        return None, None
    staged: list[Staged] = []
    what = f"loading checkpoint {directory}"
    call.run(lambda: staged.append(verify(train_state, directory, wanted)), what)
    _apply(train_state, loads, call, staged[0], wanted, custom_load_fn, what)
    loads.note(compared, said, wanted.parts, wanted.complete, call.agreed)
    log_dist(f"loaded checkpoint {directory}", ranks=[0])
    return str(directory), staged[0].states["client_state"]


def _apply(
    train_state: TrainState,
    loads: Loads,
    call: Load,
    staged: Staged,
    wanted: Wanted,
    custom_load_fn: Callable[..., None] | None,
    what: str,
) -> None:
    """Change the engine. What fails here was not foreseen, and leaves a mixture that must not be trained."""
    if train_state.partition.gatherer is not None:
        train_state.partition.gatherer.release_unused()
    reached = {"module"}
    try:
        if custom_load_fn is None:
            call.run(lambda: _load_module(train_state, staged, wanted.strict), what)
        else:
            custom_load(train_state.module, staged.tensors, custom_load_fn, call.run)
        reached = wanted.parts
        call.run(lambda: _load_states(train_state, staged, wanted), what)
    except Exception as error:
        loads.fail(
            f"{what} failed half way, so that the engine has a mixture of states: load a complete checkpoint, or build "
            f"a new engine, before training goes on ({error})",
            reached,
        )
        raise


def _load_module(train_state: TrainState, staged: Staged, strict: bool) -> None:
    """Load weights, buffers, and entries of the state dictionary that are not tensors."""
    sharded = sharded_parameters(train_state.module)
    for name in staged.pieces:
        staged.weights.load_piece(name, sharded[name].group, sharded[name].member)
    make_room(train_state.module, staged.tensors)
    missing, unexpected = names.load_state_dict(train_state.module, staged.tensors)
    if strict:  # names have been compared, but for those of modules that load themselves
        apart = tuple(prefixes_apart(train_state.module))
        missing = [name for name in missing if name.startswith(apart) and name not in sharded]
        refuse_names(staged.directory, missing, [name for name in unexpected if name.startswith(apart)])


def _load_states(train_state: TrainState, staged: Staged, wanted: Wanted) -> None:
    for group in train_state.partition.trained:
        group.refresh_masters()
    if train_state.optimizer is not None and wanted.optimizer:
        _load_optimizer(train_state, staged)
    if train_state.lr_scheduler is not None and wanted.scheduler and "lr_scheduler" in staged.states:
        train_state.lr_scheduler.load_state_dict(staged.states["lr_scheduler"])
    if train_state.optimizer is not None:
        train_state.optimizer.zero_grad()  # gradients in flight belong to the weights that were replaced
    if wanted.counters:
        _load_counters(train_state, staged.states)
    if staged.rng is not None:
        _load_rng(train_state, staged.rng)


def _load_optimizer(train_state: TrainState, staged: Staged) -> None:
    assert train_state.optimizer is not None
    optimizer, saved = train_state.optimizer.optimizer, staged.states["optimizer"]
    for group, options in zip(optimizer.param_groups, saved["options"], strict=True):
        group.update(options)
    train_state.optimizer.loss_scaler.load_state_dict(saved["loss_scale"])
    # DeepSpeed reads the key in the ZeRO stages alone.
    restore_masters = train_state.stage == 0 or train_state.values.zero_optimization.load_from_fp32_weights
    for flat, kinds, others in zip(train_state.optimizer.groups, staged.kinds, staged.others, strict=True):
        _load_group(flat, optimizer, staged.runs, kinds, others, restore_masters)


def _load_group(
    group: FlatGroup,
    optimizer: torch.optim.Optimizer,
    runs: Fragments,
    kinds: list[str],
    others: list[dict[str, Any]],
    restore_masters: bool,
) -> None:
    """Restore the masters and the optimizer states of what this rank owns now.

    Args:
        restore_masters: False keeps the masters that were made from the weights.
    """
    elements = group.layout.total // group.layout.partitions
    for master in group.masters:
        optimizer.state.pop(master, None)  # what has come since the checkpoint is of another run
    for kind in kinds:
        if kind == contents.MASTER and not restore_masters:
            continue
        shard = torch.zeros(elements, dtype=group.masters[0].dtype)  # padding stays zero
        for member, name in enumerate(group.names):
            if (mine := group.in_shard(member, shard)) is not None:
                runs.fill(mine, kind, name, group.own_range(member).start)
        for master, values in zip(group.masters, group.split(shard), strict=True):
            if kind == contents.MASTER:
                master.data.copy_(values)
            else:
                optimizer.state[master][kind] = values.to(master.device, copy=True).contiguous()
    options = optimizer.param_groups[group.group_index]
    # torch's fused and capturable kernels count steps on the device.
    on_device = options.get("fused") or options.get("capturable")
    for master, rest in zip(group.masters, others, strict=True):
        for kind, value in rest.items():
            if torch.is_tensor(value):
                value = value.to(master.device if on_device or value.ndim else "cpu", copy=True)
            optimizer.state[master][kind] = value


def _load_rng(train_state: TrainState, states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random_states.tracker.set_states({**random_states.tracker.get_states(), **states.get("named", {})})
    written_on = states.get("device_type", "cpu")
    if written_on == train_state.device.type:
        train_state.backend.runtime.set_rng_state(states["device"])
    else:
        log_dist(
            f"checkpoint was written on a device of type {written_on!r}, this run's is {train_state.device.type!r}: "
            "the device's random-number state (dropout) is not restored",
            ranks=[0],
        )


def _load_counters(train_state: TrainState, state: dict[str, Any]) -> None:
    train_state.counters.global_steps = state["global_steps"]
    train_state.counters.global_samples = state["global_samples"]
    train_state.counters.skipped_steps = state["skipped_steps"]
    # Counted in windows of the present size, which may differ from the one that wrote it.
    train_state.counters.micro_steps = (
        train_state.counters.global_steps * train_state.batch_sizes.accumulation
    )
