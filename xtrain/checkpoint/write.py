"""Writing a checkpoint: every rank its part into a temporary folder, then one rename."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from xtrain import comm, random_states
from xtrain.agree import together
from xtrain.buffers import storable
from xtrain.checkpoint import layout, optimizer_states
from xtrain.checkpoint.safe import safe_save
from xtrain.errors import CheckpointError, ConfigError
from xtrain.files import atomic_path, is_there, remove, sha256, share, sync_directory, write_text
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
        for kind, shard in optimizer_states.shards(group, engine.optimizer.optimizer).items():
            add(group, kind, shard)
    for group in engine.partition.sharded:
        # Where a master has the same dtype, it is the weight.
        if not group.masters or group.masters[0].dtype != group.dtype:
            add(group, layout.WEIGHT, group.shard)
    return tensors, index


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
        for name, value in engine.module.state_dict().items()
        if not (torch.is_tensor(value) and storable(value))
    }
    if extra:
        state["module_extra"] = extra
    if hasattr(engine.lr_scheduler, "state_dict"):
        state["lr_scheduler"] = engine.lr_scheduler.state_dict()
    return state


def _module_tensors(
    engine: XtrainEngine, exclude_frozen: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, str]]:
    """Weights and buffers that are whole on this rank; for further names of one the name it is stored under; and for
    parameters that the module's `state_dict` gives another name than their own, that name."""
    named = dict(engine.module.named_parameters(remove_duplicate=False))
    first_names = {param: name for name, param in reversed(named.items())}
    frozen = {name for name, p in named.items() if not p.requires_grad} if exclude_frozen else set()
    divided = divided_parameters(engine.module).keys() - frozen
    aliases = {name: first for name in divided if (first := first_names[named[name]]) != name}
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[tuple[int, torch.Size, Any], str] = {}
    state = engine.module.state_dict(keep_vars=True)
    elsewhere = {id(named[name]) for name in (*frozen, *divided)}
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
    engine: XtrainEngine, directory: Path, client_state: dict[str, Any], exclude_frozen: bool
) -> dict[str, Any]:
    """Write this rank's files; return their manifest entries, the index of runs, and what parameters there are."""
    model = engine.grid.model
    written: list[str] = []
    index: dict[str, list[list[Any]]] = {}
    parameters: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    renamed: dict[str, str] = {}
    if engine.grid.rank == 0:
        weights, state = (
            layout.part_of(name, model.rank, model.size) for name in (layout.MODEL, layout.STATE)
        )
        tensors, aliases, renamed = _module_tensors(engine, exclude_frozen)
        _save_tensors(tensors, directory / weights)
        safe_save(_state(engine, client_state), directory / state, _NAMES)
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
        _save_tensors(tensors, directory / name)
        index = {parameter: [[name, *run] for run in runs] for parameter, runs in index.items()}
        written.append(name)
    rng = layout.rng_file(engine.global_rank, engine.world_size)
    states = {
        "torch": torch.get_rng_state(),
        "device": engine.backend.runtime.get_rng_state(),
        "device_type": engine.device.type,
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
        manifest.update(parameters={}, aliases={}, renamed={}, runs={})  # they stand in the parts
    write_text(temporary / layout.MANIFEST, json.dumps(manifest, indent=1))
    sync_directory(temporary)
    # rename cannot replace a folder that has files: the old one steps aside first.
    # Until the second rename, find_tag finds both under their hidden names.
    old = target.with_name(layout.leftovers(target.name)[1])
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
        write_text(target.parent / layout.LATEST, target.name)


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


def _check_tag(engine: XtrainEngine, tag: str) -> str:
    """Rank 0's tag, after comparing it with the others as `checkpoint.tag_validation` says."""
    tags = [""] * engine.world_size
    comm.all_gather_object(tags, tag)
    if not layout.is_plain_name(tags[0]):
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
    engine.loads.check()
    tag = _check_tag(engine, tag)
    first = engine.global_rank == 0

    def check_place() -> None:
        if not isinstance(save_dir, str | os.PathLike) or not str(save_dir):
            raise ConfigError(f"save_dir must be the path of a folder, got {save_dir!r}")
        if (place := Path(save_dir) / tag).is_file():
            raise ConfigError(f"{place} is a file: remove it, or choose another tag")

    together(check_place, f"saving checkpoint {tag!r}", ConfigError)
    target = Path(save_dir) / tag
    temporary, stale = (target.with_name(name) for name in layout.leftovers(tag))
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
            lambda: _write_part(engine, temporary, client_state, exclude_frozen), what, CheckpointError
        )
        together(
            lambda: _publish(engine, temporary, target, parts, save_latest) if first else None,
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
