"""Reduce-scatter, all-gather and both together, in which every rank exchanges slices with every other one directly.

The bytes are those of a ring. From a megabyte up this was 2.9 to 3.6 times as fast as gloo's own reduce-scatter and 2.3
to 2.5 times as fast as its all-gather on two ranks, 1.8 to 2.8 and 1.3 to 1.7 times on four (docs/measurements.md):
its transport moves several messages at once and nothing is copied between. Shared memory needs no such help.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.collectives import _all_gather, all_gather_into_tensor, all_reduce, reduce_scatter_tensor
from xtrain.comm.counted import Group, count
from xtrain.comm.deterministic import tree_sum
from xtrain.comm.failures import explained
from xtrain.comm.point_to_point import exchange
from xtrain.comm.timing import Running, finish

_LIBRARIES = frozenset({"gloo"})
"""Process-group libraries whose own collectives are slower."""


def _others(rows: Sequence[torch.Tensor], rank: int) -> list[torch.Tensor | None]:
    """One row for every rank but this one."""
    return [None if peer == rank else row for peer, row in enumerate(rows)]


def is_direct(group: Group) -> bool:
    """Whether messages between its ranks are faster, or can do more, than the library's own exchanges."""
    return dist.get_world_size(group) > 1 and dist.get_backend(group) in _LIBRARIES


class SliceSum:
    """A running reduce-scatter: `wait()` returns this rank's slice of the sum over the ranks.

    Args:
        tensor: (ranks x slice,) contiguous; may be overwritten.
    """

    def __init__(self, tensor: torch.Tensor, group: Group) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        rows = list(tensor.view(ranks, -1).unbind())
        self._works: list[Any]
        self._clock: Running | None = None
        if not is_direct(group):
            self._rows = [rows[rank]]
            self._works = [reduce_scatter_tensor(rows[rank], tensor, group=group, async_op=True)]
            return
        self._clock = count("reduce_scatter", tensor.nbytes, group)
        space = torch.empty_like(tensor[: tensor.numel() // ranks * (ranks - 1)]).view(ranks - 1, -1)
        received = list(space.unbind())
        received.insert(rank, rows[rank])
        self._rows = received
        self._sent = tensor  # the transport reads from it
        self._works = exchange(_others(received, rank), _others(rows, rank), group)

    def wait(self) -> torch.Tensor:
        """This rank's slice, added in the order of a fixed tree over rank numbers."""
        for work in self._works:
            work.wait()
        finish(self._clock, None)
        return tree_sum(self._rows)


class SliceGather:
    """A running all-gather of every rank's slice into `full`, of which `mine` may be a view.

    Args:
        channel: of `exchange`: where messages are direct, gathers of different channels never meet.
    """

    def __init__(self, full: torch.Tensor, mine: torch.Tensor, group: Group, channel: int = 0) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self._clock: Running | None = None
        if not is_direct(group):
            self._works: list[Any] = [all_gather_into_tensor(full, mine, group=group, async_op=True)]
            return
        self._clock = count("all_gather", full.nbytes, group)
        rows = list(full.view(ranks, -1).unbind())
        if rows[rank].data_ptr() != mine.data_ptr():
            rows[rank].copy_(mine)
        self._works = exchange(_others(rows, rank), _others([rows[rank]] * ranks, rank), group, channel)

    def wait(self) -> None:
        """Wait until `full` is complete."""
        for work in self._works:
            work.wait()
        finish(self._clock, None)


@explained
def _all_gather_number(numbers: torch.Tensor, mine: torch.Tensor, group: Group) -> Any:
    return _all_gather(numbers, mine, group=group, async_op=True)


class NumberGather:
    """A running exchange of one whole number of each rank; the ledger calls it `roll_call`.

    Args:
        number: this rank's.
        device: that the group's library reaches.
    """

    def __init__(self, number: int, group: Group, device: torch.device) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self._numbers = torch.full((ranks,), number, dtype=torch.int64, device=device)
        self._clock = count("roll_call", self._numbers.nbytes, group)
        if not is_direct(group):
            mine = self._numbers[:1].clone()
            self._works: list[Any] = [_all_gather_number(self._numbers, mine, group)]
            return
        mine = self._numbers[rank : rank + 1]
        rows = self._numbers.split(1)
        self._works = exchange(_others(rows, rank), _others([mine] * ranks, rank), group)

    def wait(self) -> list[int]:
        """Every rank's number, by rank."""
        for work in self._works:
            work.wait()
        finish(self._clock, None)
        return self._numbers.tolist()


class SliceAllReduce:
    """A running all-reduce in place whose bits are those of `SliceSum`: the two together, where that is direct.

    Two ranks need it not: a sum of two has one order only, and the library's own call is faster.
    """

    def __init__(self, tensor: torch.Tensor, group: Group) -> None:
        ranks = dist.get_world_size(group)
        self._tensor, self._group, self._work = tensor, group, None
        if ranks == 2 or not is_direct(group):
            self._work = all_reduce(tensor, group=group, async_op=True)
            return
        missing = -tensor.numel() % ranks
        self._padded = torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
        self._sum = SliceSum(self._padded, group)

    def wait(self) -> torch.Tensor:
        """The sum over ranks: the tensor itself."""
        if self._work is not None:
            self._work.wait()
            return self._tensor
        SliceGather(self._padded, self._sum.wait(), self._group).wait()
        if self._padded is not self._tensor:
            self._tensor.copy_(self._padded[: self._tensor.numel()])
        return self._tensor
