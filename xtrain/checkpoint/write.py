"""Writing a checkpoint: every rank its part into a temporary folder, then one rename."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xtrain import comm
from xtrain.activation_checkpointing import random_states
from xtrain.base.errors import CheckpointError, ConfigError
from xtrain.base.files import atomic_path, is_there, remove, sha256, share, sync_directory, write_text
from xtrain.base.log import log_dist
from xtrain.base.run_folder import APART_VARIABLE
from xtrain.checkpoint import contents, optimizer_states
from xtrain.checkpoint.safe import safe_save
from xtrain.comm.rank_agreement import together
from xtrain.version import __version__
from xtrain.zero import names
from xtrain.zero.buffers import storable
from xtrain.zero.flat import FlatGroup
from xtrain.zero.home import full_shape
from xtrain.zero.train_state import TrainState
from xtrain.zero.weights import sharded_parameters


def _owned_states(
    train_state: TrainState, exclude_frozen: bool
) -> tuple[dict[str, torch.Tensor], dict[str, list[list[Any]]]]:
    """This rank's runs by key, and for each parameter the [kind, start, stop] of its runs."""
    tensors: dict[str, torch.Tensor] = {}
    index: dict[str, list[list[Any]]] = {}

    def add(group: FlatGroup, kind: str, shard: torch.Tensor) -> None:
        for member, name in enumerate(group.names):
            mine, own = group.in_shard(member, shard), group.own_range(member)
            if mine is None or (exclude_frozen and not group.members[member].requires_grad):
                continue
            tensors[contents.run_key(kind, name, own.start)] = mine.detach().cpu().clone()
            index.setdefault(name, []).append([kind, own.start, own.stop])

    for group in train_state.optimizer.groups if train_state.optimizer is not None else ():
        assert train_state.optimizer is not None
        for kind, shard in optimizer_states.shards(group, train_state.optimizer.optimizer).items():
            add(group, kind, shard)
    for group in train_state.partition.sharded:
        # Where a master has the same dtype, it is the weight.
        if not group.masters or group.masters[0].dtype != group.dtype:
            add(group, contents.WEIGHT, group.shard)
    return tensors, index


def _state(train_state: TrainState, client_state: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {
        "global_steps": train_state.counters.global_steps,
        "micro_steps": train_state.counters.micro_steps,
        "global_samples": train_state.counters.global_samples,
        "skipped_steps": train_state.counters.skipped_steps,
        "client_state": client_state,
    }
    if train_state.optimizer is not None:
        optimizer = train_state.optimizer
        state["optimizer"] = {
            "type": type(optimizer.optimizer).__name__,
            "loss_scale": optimizer.loss_scaler.state_dict(),
            "options": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
            "scalars": {
                name: rest
                for group in optimizer.groups
                for name, rest in optimizer_states.others(group, optimizer.optimizer).items()
            },
            # So that a manifest that lacks some of them is not taken for one from before the first step.
            "kinds": {
                group.names[0]: optimizer_states.kinds(group, optimizer.optimizer)
                for group in optimizer.groups
            },
        }
    extra = {
        name: value.detach().cpu() if torch.is_tensor(value) else value
        for name, value in names.state_dict(train_state.module).items()
        if not (torch.is_tensor(value) and storable(value))
    }
    if extra:
        state["module_extra"] = extra
    if hasattr(train_state.lr_scheduler, "state_dict"):
        state["lr_scheduler"] = train_state.lr_scheduler.state_dict()
    return state


def _module_tensors(
    train_state: TrainState, exclude_frozen: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    """Weights and buffers that are whole on this rank; for further names of one the name it is stored under; and for
    parameters that the module's `state_dict` gives another name than their own, that name."""
    named = dict(names.parameters(train_state.module, remove_duplicate=False))
    first_names = {param: name for name, param in reversed(named.items())}
    frozen = {name for name, p in named.items() if not p.requires_grad} if exclude_frozen else set()
    sharded = sharded_parameters(train_state.module).keys() - frozen
    aliases = {name: first for name in sharded if (first := first_names[named[name]]) != name}
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, torch.Size, Any], str] = {}
    state = names.state_dict(train_state.module, keep_vars=True)
    elsewhere = {id(named[name]) for name in (*frozen, *sharded)}
    for name, value in state.items():
        if not (torch.is_tensor(value) and storable(value)) or id(value) in elsewhere:
            continue
        key = (value.data_ptr(), value.shape, value.stride())
        if value.numel() and key in seen:
            aliases[name] = seen[key]  # a tied weight: stored once
            continue
        seen[key] = name
        tensors[name] = value.detach().cpu().contiguous().clone()
    given = {id(value): name for name, value in reversed(state.items())}
    renamed = {n: given[id(p)] for n, p in named.items() if n not in state and id(p) in given}
    return tensors, aliases, renamed


_NAMES = {
    "client_state": "client_state",
    "optimizer": "the optimizer's state",
    "lr_scheduler": "the scheduler's state",
    "module_extra": "the module's extra state",
}
"""What the parts of the state file are called in errors."""


def _write_part(
    train_state: TrainState, directory: Path, client_state: dict[str, Any], exclude_frozen: bool
) -> dict[str, Any]:
    """Write this rank's files; return their manifest entries, the index of runs, and what parameters there are."""
    model = train_state.grid.model
    written: list[str] = []
    index: dict[str, list[list[Any]]] = {}
    parameters: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    renamed: dict[str, str] = {}
    if train_state.grid.rank == 0:
        weights, state = (
            contents.part_of(name, model.rank, model.size) for name in (contents.MODEL, contents.STATE)
        )
        tensors, aliases, renamed = _module_tensors(train_state, exclude_frozen)
        _save_tensors(tensors, directory / weights)
        safe_save(_state(train_state, client_state), directory / state, _NAMES)
        written += [weights, state]
        parameters = {
            name: {"shape": list(full_shape(param)), "dtype": str(param.dtype).removeprefix("torch.")}
            for name, param in names.parameters(train_state.module)
        }
    # In stage 0 every rank owns the same states: the first data-parallel rank writes them.
    partitioned = train_state.stage > 0
    has_states = train_state.optimizer is not None or bool(train_state.partition.sharded)
    if has_states and (partitioned or train_state.grid.rank == 0):
        name = contents.optimizer_file(train_state.grid.rank, train_state.grid.size if partitioned else 1)
        name = contents.part_of(name, model.rank, model.size)
        tensors, index = _owned_states(train_state, exclude_frozen)
        _save_tensors(tensors, directory / name)
        index = {parameter: [[name, *run] for run in runs] for parameter, runs in index.items()}
        written.append(name)
    rng = contents.rng_file(train_state.global_rank, train_state.world_size)
    states = {
        "torch": torch.get_rng_state(),
        "device": train_state.backend.runtime.get_rng_state(),
        "device_type": train_state.device.type,
        "named": random_states.tracker.get_states(),
    }
    safe_save(states, directory / rng, "the random-number state")
    written.append(rng)
    files = {}
    for name in written:
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
    described = {"parameters": parameters, "aliases": aliases, "renamed": renamed}
    return {"files": files, "part": model.rank, "runs": index, **described}


def _save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)
    share(path)


def _merge(parts: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """`parameters`, `aliases`, `renamed` and `runs` of one model-parallel rank, from what the ranks have written."""
    parameters: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    renamed: dict[str, str] = {}
    runs: dict[str, list[list[Any]]] = {}
    for part in parts:
        if part["part"] == number:
            parameters.update(part["parameters"])
            aliases.update(part["aliases"])
            renamed.update(part["renamed"])
            for parameter, entries in part["runs"].items():
                runs.setdefault(parameter, []).extend(entries)
    return {"parameters": parameters, "aliases": aliases, "renamed": renamed, "runs": runs}


def _publish(
    train_state: TrainState, temporary: Path, target: Path, parts: list[dict[str, Any]], latest: bool
) -> None:
    model = train_state.grid.model
    manifest = {
        "format": contents.FORMAT,
        "version": contents.VERSION,
        "xtrain": __version__,
        "global_steps": train_state.counters.global_steps,
        "ranks": train_state.world_size,
        "data_parallel_ranks": train_state.grid.size,
        "zero_stage": train_state.stage,
        "files": {name: entry for part in parts for name, entry in sorted(part["files"].items())},
        **_merge(parts, 0),
    }
    if model.size > 1:
        manifest["model_parallel"] = {"tensor": model.tensor, "pipeline": model.pipeline}
        manifest["parts"] = [_merge(parts, number) for number in range(model.size)]
        manifest.update(parameters={}, aliases={}, renamed={}, runs={})  # they stand in the parts
    write_text(temporary / contents.MANIFEST, json.dumps(manifest, indent=1))
    sync_directory(temporary)
    # rename cannot replace a folder that has files: the old one steps aside first.
    # Until the second rename, find_tag finds both under their hidden names.
    old = target.with_name(contents.leftovers(target.name)[1])
    if is_there(target):
        remove(old)
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if is_there(old):
            old.rename(target)
        raise
    remove(old)
    sync_directory(target.parent)
    _write_converter(target.parent)
    if latest:
        write_text(target.parent / contents.LATEST, target.name)


_CONVERTER = '''#!/usr/bin/env python
"""Write the float32 weights of a checkpoint in this folder as files for other programs.

python zero_to_fp32.py . OUTPUT_DIR [--tag TAG] [--safe_serialization]; --help says more. Needs xtrain.
"""

import sys

from xtrain.utils.zero_to_fp32 import main

if __name__ == "__main__":
    sys.exit(main())
'''


def _write_converter(save_dir: Path) -> None:
    """The script that DeepSpeed's users look for beside their checkpoints."""
    path = save_dir / "zero_to_fp32.py"
    if not path.is_file() or path.read_bytes() != _CONVERTER.encode():
        with atomic_path(path) as temporary:
            temporary.write_text(_CONVERTER, encoding="utf-8")
        path.chmod(path.stat().st_mode | 0o111)


def _check_tag(train_state: TrainState, tag: str) -> str:
    """Rank 0's tag, after comparing it with the others as `checkpoint.tag_validation` says."""
    tags = [""] * train_state.world_size
    comm.all_gather_object(tags, tag)
    if not contents.is_plain_name(tags[0]):
        raise CheckpointError(
            f"checkpoint tag {tags[0]!r} must be a plain name, without '/' and not starting with '.'"
        )
    if len(set(tags)) > 1:
        message = f"ranks gave different checkpoint tags: {', '.join(sorted(set(tags)))}"
        mode = train_state.values.checkpoint.tag_validation
        if mode == "Fail":
            raise ConfigError(message)
        if mode == "Warn":
            log_dist(f"{message}; using {tags[0]!r}", ranks=[0])
    return tags[0]


def save(
    train_state: TrainState,
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
    tag = _check_tag(train_state, tag)
    # Where nodes do not share the folder, each has its own, and the launcher puts them together: launch/collect.py.
    first = train_state.global_rank == 0 or (APART_VARIABLE in os.environ and comm.get_local_rank() == 0)

    def check_place() -> None:
        if not isinstance(save_dir, str | os.PathLike) or not str(save_dir):
            raise ConfigError(f"save_dir must be the path of a folder, got {save_dir!r}")
        if (place := Path(save_dir) / tag).is_file():
            raise ConfigError(f"{place} is a file: remove it, or choose another tag")

    together(check_place, f"saving checkpoint {tag!r}", ConfigError)
    target = Path(save_dir) / tag
    temporary, stale = (target.with_name(name) for name in contents.leftovers(tag))
    what = f"saving checkpoint {target}"

    def prepare() -> None:
        if first:
            remove(temporary)
            temporary.mkdir(parents=True)
            if is_there(target):
                remove(stale)

    try:
        together(prepare, what, CheckpointError)
        parts = together(
            lambda: _write_part(train_state, temporary, client_state, exclude_frozen), what, CheckpointError
        )
        together(
            lambda: _publish(train_state, temporary, target, parts, save_latest) if first else None,
            what,
            CheckpointError,
        )
    except CheckpointError:
        if first:  # all ranks have stopped writing; a full disk wants its space back
            with suppress(OSError):
                remove(temporary)
        raise
    log_dist(f"saved checkpoint {target}", ranks=[0])
    return target
