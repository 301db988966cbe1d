"""Whole weights out of a checkpoint, without an engine: for evaluation, other programs, or a model hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from xtrain.base.errors import CheckpointError, ConfigError, NotImplementedYetError
from xtrain.base.files import atomic_path, write_text
from xtrain.base.log import logger
from xtrain.checkpoint import contents
from xtrain.checkpoint.fragments import Fragments, Weights
from xtrain.checkpoint.verify import read_torch
from xtrain.zero import names
from xtrain.zero.buffers import storable, stored_bytes

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | Path,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, torch.Tensor]:
    """The model's state dictionary on the host, in float32: from the master weights where there are any.

    Buffers are in it, integer ones as they are. A tied weight is one tensor that stands under each of its names.

    Args:
        checkpoint_dir: the folder that save_checkpoint wrote to.
        tag: which checkpoint; None: what `latest` names.
        exclude_frozen_parameters: leave out parameters that had no master weight.
        lazy_mode: not there yet.

    Raises:
        CheckpointError: there is no complete checkpoint, it is damaged, or holds a model divided by model parallelism.
    """
    if lazy_mode:
        raise NotImplementedYetError(
            "lazy_mode=True", "leave it out: files are mapped, and tensors are copied"
        )
    found = contents.find_tag(Path(checkpoint_dir), tag)
    if found is None:
        raise CheckpointError(
            f"{checkpoint_dir} holds no checkpoint: pass the folder that save_checkpoint wrote to"
        )
    directory = Path(checkpoint_dir) / found
    manifest = contents.select_part(contents.read_manifest(directory), directory, 0, tensor=1, pipeline=1)
    weights = Weights(Fragments(directory, manifest), masters=lambda _: True)
    state: dict[str, torch.Tensor] = {}
    # The order of the parameters, which loading does not need and people like; then buffers, then further names.
    stored = weights.names - weights.aliases.keys()
    for name in [*manifest["parameters"], *sorted(stored - manifest["parameters"].keys())]:
        frozen = name in manifest["parameters"] and not weights.has_master(name)
        given = weights.renamed.get(name, name)
        if name not in weights.names or given in state or (exclude_frozen_parameters and frozen):
            continue
        state[given] = weights.whole(name)
    # What safetensors files do not hold: sparse buffers.
    extra = read_torch(directory, manifest, contents.own_file(manifest, contents.STATE)).get(
        "module_extra", {}
    )
    state.update((name, value) for name, value in extra.items() if torch.is_tensor(value))
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    state.update({alias: state[name] for alias, name in weights.aliases.items() if name in state})
    return state


def load_state_dict_from_zero_checkpoint(
    model: nn.Module, checkpoint_dir: str | Path, tag: str | None = None
) -> nn.Module:
    """Load a checkpoint's weights into a plain model, which goes to the host, and return it.

    Names that the checkpoint lacks or the model does not know are left alone, and logged.
    """
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model.cpu()
    missing, unexpected = names.load_state_dict(model, state)
    if missing or unexpected:
        logger.warning(
            "loading %s: the model's %s are not in it, its %s are not the model's",
            checkpoint_dir,
            missing,
            unexpected,
        )
    return model


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int | None = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write a checkpoint's float32 state dictionary as files that Transformers loads.

    Args:
        output_dir: gets `pytorch_model.bin`, or several such files and an index when it is larger than a shard.
        max_shard_size: bytes, or a string such as "5GB"; None: one file.
        safe_serialization: write `model.safetensors` instead.
        checkpoint_dir, tag, exclude_frozen_parameters: see get_fp32_state_dict_from_zero_checkpoint.
    """
    convert(checkpoint_dir, output_dir, max_shard_size, safe_serialization, tag, exclude_frozen_parameters)


def convert(
    checkpoint_dir: str | Path,
    output_dir: str | Path,
    max_shard_size: str | int | None,
    safe_serialization: bool,
    tag: str | None,
    exclude_frozen_parameters: bool,
) -> dict[Path, dict[str, torch.Tensor]]:
    """What `convert_zero_checkpoint_to_fp32_state_dict` does; returns what each file holds."""
    limit = None if max_shard_size is None else _bytes(max_shard_size)
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters)
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if safe_serialization and (odd := [name for name, value in state.items() if not storable(value)]):
        raise CheckpointError(
            f"{odd[0]!r} is {state[odd[0]].layout} {state[odd[0]].dtype}, which safetensors files cannot hold: leave "
            "safe_serialization out"
        )
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    shards = _shards(state, limit)
    where: dict[str, str] = {}
    written = {}
    for number, shard in enumerate(shards, 1):
        name = (
            f"{stem}.{suffix}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        )
        with atomic_path(folder / name) as temporary:
            if safe_serialization:
                save_file(_apart(shard), temporary, metadata={"format": "pt"})
            else:
                torch.save(shard, temporary)
        where.update(dict.fromkeys(shard, name))
        written[folder / name] = shard
    if len(shards) > 1:
        size = sum(map(stored_bytes, state.values()))
        index = {"metadata": {"total_size": size}, "weight_map": where}
        write_text(folder / f"{stem}.{suffix}.index.json", json.dumps(index, indent=2) + "\n")
    return written


def _apart(shard: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with a tensor of its own for each name: safetensors files know no tied weights."""
    first = {id(value): name for name, value in reversed(shard.items())}
    return {name: value if first[id(value)] == name else value.clone() for name, value in shard.items()}


def _bytes(size: str | int) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]B)?", str(size).strip().upper())
    if match is None or not int(match[1]):
        raise ConfigError(
            f"max_shard_size={size!r} is not a size: write a number of bytes, or for example '5GB'"
        )
    return int(match[1]) * _UNITS[match[2] or ""]


def _shards(state: Mapping[str, torch.Tensor], limit: int | None) -> list[dict[str, torch.Tensor]]:
    """The dictionary in pieces of at most `limit` bytes, or of one tensor that is larger."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    room = limit
    for name, value in state.items():
        if room is not None and limit is not None:
            if shards[-1] and stored_bytes(value) > room:
                shards.append({})
                room = limit
            room -= stored_bytes(value)
        shards[-1][name] = value
    return shards
