"""`deepspeed.checkpoint.utils`: what Accelerate and others save state dictionaries with."""

from __future__ import annotations

from typing import Any

import torch

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
