"""Where things may begin inside a larger block of memory.

Kernels round by alignment, so a tensor gives the same bits in a block and in memory of its own only where it begins as
one of its own does. Whoever places something (parameters in a flat buffer, activations in rows, pieces in slots) asks
here. The block itself is as aligned as its allocator makes it: 64 bytes in torch's host memory, 256 and more on chips.
"""

from __future__ import annotations

import torch

HOST_BYTES = 64
"""Alignment of torch's host allocator: a cache line, and the widest vector that host kernels load."""


def round_up(position: int, unit: int) -> int:
    """The first multiple of `unit` at or after `position`."""
    return -(-position // unit) * unit


def aligned_unit(alignment_bytes: int, *dtypes: torch.dtype) -> int:
    """Elements of a block at whose multiples something may begin, whichever of the dtypes the block has.

    Args:
        alignment_bytes: the backend's (`backend.zero.alignment_bytes`), or HOST_BYTES.
    """
    return max(1, alignment_bytes // min(dtype.itemsize for dtype in dtypes))


def is_aligned(tensor: torch.Tensor, alignment_bytes: int = HOST_BYTES) -> bool:
    """Whether a strided tensor begins where one in memory of its own may begin."""
    return tensor.data_ptr() % alignment_bytes == 0
