"""`deepspeed.checkpoint.utils`: what Accelerate and others save state dictionaries with."""

from __future__ import annotations

from typing import Any

import torch

from xtrain.base.errors import NotImplementedYetError

_HOST = torch.device("cpu")


def clone_tensors_for_torch_save(item: Any, device: torch.device | str = _HOST) -> Any:
    """A copy of nested lists, tuples and dictionaries in which every tensor has a storage of its own, on `device`.

    torch.save writes the whole storage of a tensor, and here many tensors are views of one flat buffer.
    """
    if torch.is_tensor(item):
        return item.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    if isinstance(item, (list, tuple)):
        copies = [clone_tensors_for_torch_save(value, device) for value in item]
        return copies if isinstance(item, list) else tuple(copies)
    if isinstance(item, dict):
        return type(item)((key, clone_tensors_for_torch_save(value, device)) for key, value in item.items())
    return item


_OTHER_FILES = "read them by name: xtrain.checkpoint.read_manifest says which file holds what"


def get_model_ckpt_name_for_rank(base_folder: str, mp_rank_str: str) -> str:
    """Not there: xtrain's checkpoints have other files."""
    raise NotImplementedYetError("DeepSpeed's names of checkpoint files", _OTHER_FILES)


def get_zero_ckpt_name_for_rank(base_folder: str, dp_rank: int, mp_rank: int) -> str:
    """Not there: xtrain's checkpoints have other files."""
    raise NotImplementedYetError("DeepSpeed's names of checkpoint files", _OTHER_FILES)
