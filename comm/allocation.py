"""Allocates buffers that will be exchanged often, where the group's library reaches them. Communicates nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist


def zeros(
    elements: int, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """A flat tensor of zeros, in memory that the group's library can exchange without a copy where it has such.

    Args:
        group: None: all ranks.
    """
    if device.type == "cpu" and dist.is_initialized():
        own = getattr(group or dist.group.WORLD, "zeros", None)
        if own is not None:
            made: torch.Tensor = own(elements, dtype)
            return made
    return torch.zeros(elements, dtype=dtype, device=device)
