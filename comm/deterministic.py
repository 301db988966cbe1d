"""Sums over ranks whose bits do not depend on the library: it moves data, the addition is done here.

Vendor collectives add contributions in an order of their own. Here an all-to-all brings every rank the
contributions to its slice, and these are added in float32 by one fixed pairwise tree over rank numbers:
(r0 + r1) + (r2 + r3) and so on. The bytes are those of a ring: a reduce-scatter, and for an all-reduce
an all-gather after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.collectives import all_gather_into_tensor, all_to_all_single


def tree_sum(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Add tensors pairwise, neighbours first; an odd one out is carried to the next level. Overwrites `rows`."""
    level = list(rows)
    while len(level) > 1:
        pairs = [level[i].add_(level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0]


class CanonicalReduceScatter:
    """A running reduce-scatter of a float32 tensor; `wait()` returns this rank's slice of the sum."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        self._received = torch.empty_like(tensor)
        self._ranks = dist.get_world_size(group)
        self._work: Any = all_to_all_single(self._received, tensor, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        """This rank's slice, summed over ranks."""
        self._work.wait()
        return tree_sum(self._received.view(self._ranks, -1).unbind())


class CanonicalAllReduce:
    """A running all-reduce of a float32 tensor of any length; `wait()` returns the whole sum."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup | None) -> None:
        self._size, self._group = tensor.numel(), group
        ranks = dist.get_world_size(group)
        self._padded = torch.nn.functional.pad(tensor, (0, -self._size % ranks))
        self._scatter = CanonicalReduceScatter(self._padded, group)

    def wait(self) -> torch.Tensor:
        """The sum over ranks."""
        all_gather_into_tensor(self._padded, self._scatter.wait().contiguous(), group=self._group)
        return self._padded[: self._size]
