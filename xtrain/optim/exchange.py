"""Brings divided parameters together, each whole on one rank, and takes results back to their slices.

Two all-to-alls with splits of different sizes: a rank sends only what another rank works on, and work is
shared. See docs/decisions/0003-whole-matrices.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.optim.parameterwise import ParamFragments

ROUND_ELEMENTS = 2**24
"""Elements that a rank brings together at a time, which bounds the transient memory (64 MiB of float32)."""


def rounds(
    items: Sequence[ParamFragments], ranks: int, limit: int = ROUND_ELEMENTS
) -> Iterator[list[ParamFragments]]:
    """Split the parameters so that a rank gets about `limit` elements, but each rank one parameter at least."""
    batch: list[ParamFragments] = []
    elements = 0
    for item in items:
        size = item.shape.numel()
        if len(batch) >= ranks and elements + size > ranks * limit:
            yield batch
            batch, elements = [], 0
        batch.append(item)
        elements += size
    if batch:
        yield batch


def assign(costs: Sequence[float], ranks: int) -> list[int]:
    """Which rank works on which parameter: the most expensive first, each to the least busy rank."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = min(range(ranks), key=load.__getitem__)
        load[owners[index]] += costs[index]
    return owners


class Exchange:
    """One round.

    Args:
        items: the parameters, in the same order on every rank.
        owners: the rank that gets each of them.
    """

    def __init__(
        self, items: Sequence[ParamFragments], owners: Sequence[int], group: dist.ProcessGroup | None
    ) -> None:
        self.group = group
        ranks = comm.get_world_size(group)
        me = comm.get_rank(group)
        # On the parameters' device, also where masters are offloaded. A rank may have nothing to send.
        self._empty = items[0].tensor.new_empty(0, device=items[0].parameter.device)
        self.mine = [item for item, owner in zip(items, owners, strict=True) if owner == me]
        # What goes out, by receiver; what comes in, by sender. Both sides list parameters in the same order.
        self._outgoing = [
            [item for item, owner in zip(items, owners, strict=True) if owner == rank and item.own.length]
            for rank in range(ranks)
        ]
        self._incoming = [
            [(item, run) for item in self.mine for run in item.fragments if run.rank == rank]
            for rank in range(ranks)
        ]
        self._out_sizes = [sum(item.own.length for item in part) for part in self._outgoing]
        self._in_sizes = [sum(run.length for _, run in part) for part in self._incoming]

    def bring(self, source: Callable[[ParamFragments], torch.Tensor]) -> list[torch.Tensor]:
        """Whole copies of `mine`, from `source(parameter)`: this rank's elements, one-dimensional."""
        sent = [source(item) for part in self._outgoing for item in part]
        received = self._move(sent, self._out_sizes, self._in_sizes)
        wholes = {item: received.new_empty(item.shape.numel()) for item in self.mine}
        pieces = [entry for part in self._incoming for entry in part]
        for (item, run), piece in zip(pieces, received.split([run.length for _, run in pieces]), strict=True):
            wholes[item][run.start : run.stop].copy_(piece)
        return [wholes[item].view(item.shape) for item in self.mine]

    def take_back(
        self, wholes: Sequence[torch.Tensor], target: Callable[[ParamFragments], torch.Tensor]
    ) -> None:
        """Copy every rank's elements of the results into `target(parameter)`."""
        flat = {item: whole.reshape(-1) for item, whole in zip(self.mine, wholes, strict=True)}
        sent = [flat[item][run.start : run.stop] for part in self._incoming for item, run in part]
        received = self._move(sent, self._in_sizes, self._out_sizes)
        items = [item for part in self._outgoing for item in part]
        for item, piece in zip(items, received.split([item.own.length for item in items]), strict=True):
            target(item).copy_(piece)

    def _move(self, parts: list[torch.Tensor], out_sizes: list[int], in_sizes: list[int]) -> torch.Tensor:
        sent = torch.cat([self._empty, *(part.to(self._empty.device) for part in parts)])
        received = sent.new_empty(sum(in_sizes))
        comm.all_to_all_single(received, sent, in_sizes, out_sizes, group=self.group)
        return received
