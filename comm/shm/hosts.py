"""Collectives of ranks on several hosts: shared memory inside a host, gloo between hosts.

Where the hosts have equally many ranks, the i-th ranks of all hosts exchange the i-th slice, so that every rank
carries its share of the network's traffic; else one leader a host carries all. gloo only moves: sums are formed here,
first inside a host and then over hosts in their order, in fp32 for 16-bit floats, with one rounding.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xtrain.comm.reduce_op import Kind, divide, kind_of
from xtrain.comm.shm.exchange import Exchange, Steps, as_bytes
from xtrain.comm.shm.reduction import NARROW, Reduction

_NAP = 0.0001


class Hosts:
    """The collectives over several hosts.

    Args:
        here: those between the ranks of this host.
        hosts: the group's ranks by host, in ascending order.
        me: this rank in the group.
        across: a gloo group of the ranks in this one's position on every host; None where it is not needed.
        inner: a gloo group of all ranks.
    """

    def __init__(
        self, here: Exchange, hosts: Sequence[Sequence[int]], me: int, across: Any, inner: Any
    ) -> None:
        self._here, self._hosts, self._across, self._inner = here, hosts, across, inner
        self.window = here.window
        self._me, self._size = me, sum(map(len, hosts))
        self._host = next(i for i, ranks in enumerate(hosts) if me in ranks)
        self._order = torch.tensor([rank for ranks in hosts for rank in ranks])
        self._equal = len({len(ranks) for ranks in hosts}) == 1
        self._abroad = False

    # Between hosts.

    def _wait(self, work: Any) -> Steps:
        self._abroad = True
        try:
            while not work.is_completed():
                yield
            work.wait()
        finally:
            self._abroad = False

    def doze(self, seconds: float) -> None:
        """Sleep until a rank of this host comes that is missing, or a little where gloo is waited for."""
        if self._abroad:
            time.sleep(_NAP)
        else:
            self.window.doze(seconds)

    def _sum_across(self, out: Tensor, flat: Tensor, reduction: Reduction) -> Steps:
        """The h-th of equal pieces of all hosts' `flat` added into host h's `out`."""
        received = torch.empty_like(flat)
        yield from self._wait(self._across.alltoall_base(as_bytes(received), as_bytes(flat), [], []))
        reduction.into(out, list(received.chunk(len(self._hosts))))

    def _gather_across(self, flat: Tensor, mine: Tensor) -> Steps:
        yield from self._wait(self._across._allgather_base(as_bytes(flat), as_bytes(mine)))

    # Reductions.

    def _parts(self, op: Any, dtype: torch.dtype) -> tuple[Any, Reduction, int | None]:
        """The operation inside a host, the one over hosts, and what the total is divided by."""
        kind = kind_of(op)
        if kind == Kind.AVG:
            return Kind.SUM, Reduction(Kind.SUM, dtype, len(self._hosts)), self._size
        over = Kind.SUM if kind == Kind.PREMUL_SUM else kind
        return op, Reduction(over, dtype, len(self._hosts)), None

    def all_reduce(self, flat: Tensor, op: Any, root: int = -1) -> Steps:
        """Reduce in place, on every rank or (with `root`) on one."""
        dtype = torch.float32 if flat.dtype in NARROW else flat.dtype
        inside, over, divisor = self._parts(op, dtype)
        ways = self._size if self._equal else len(self._hosts)
        padded = torch.zeros(-(-len(flat) // ways) * ways, dtype=dtype)
        padded[: len(flat)].copy_(flat)
        if self._equal:
            piece = torch.empty(len(padded) // self._here.size, dtype=dtype)
            counts = [len(piece)] * self._here.size
            yield from self._here.reduce_scatter(piece, padded, counts, inside)
            yield from self._over_hosts(piece, over)
            yield from self._here.all_gather(padded, piece)
        else:
            yield from self._here.all_reduce(padded, inside, root=0)
            if self._here.me == 0:
                yield from self._over_hosts(padded, over)
            yield from self._here.broadcast(padded, 0)
        if root in (-1, self._me):
            divide(padded, divisor)
            flat.copy_(padded[: len(flat)])

    def _over_hosts(self, flat: Tensor, over: Reduction) -> Steps:
        part = torch.empty(len(flat) // len(self._hosts), dtype=flat.dtype)
        yield from self._sum_across(part, flat, over)
        yield from self._gather_across(flat, part)

    def reduce_scatter(self, out: Tensor, flat: Tensor, counts: Sequence[int], op: Any) -> Steps:
        """Reduce consecutive pieces of counts[r] elements, the r-th into rank r's `out`."""
        start = sum(counts[: self._me])
        if not self._equal or len(set(counts)) > 1:
            whole = flat.clone()
            yield from self.all_reduce(whole, op)
            out.copy_(whole[start : start + len(out)])
            return
        dtype = torch.float32 if flat.dtype in NARROW else flat.dtype
        inside, over, divisor = self._parts(op, dtype)
        # Rank i of this host sums what the i-th ranks of all hosts will get.
        by_position = self._order.view(len(self._hosts), -1).t().reshape(-1)
        sorted_rows = flat.view(self._size, -1)[by_position].to(dtype).view(-1)
        piece = torch.empty(len(out) * len(self._hosts), dtype=dtype)
        yield from self._here.reduce_scatter(piece, sorted_rows, [len(piece)] * self._here.size, inside)
        total = torch.empty(len(out), dtype=dtype)
        yield from self._sum_across(total, piece, over)
        divide(total, divisor)
        out.copy_(total)

    # Moving.

    def all_gather(self, flat: Tensor, mine: Tensor) -> Steps:
        """Every rank's `mine`, one after the other, in `flat`."""
        if not self._equal:
            yield from self.spread("all_gather", mine, list(flat.view(self._size, -1)))
            return
        column = torch.empty(len(self._hosts) * len(mine), dtype=flat.dtype)
        yield from self._gather_across(column, mine)
        whole = torch.empty_like(flat)
        yield from self._here.all_gather(whole, column)
        by_position = self._order.view(len(self._hosts), -1).t().reshape(-1)
        flat.view(self._size, -1)[by_position] = whole.view(self._size, -1)

    def broadcast(self, flat: Tensor, root: int) -> Steps:
        """The root's tensor on every rank."""
        source = next(i for i, ranks in enumerate(self._hosts) if root in ranks)
        if self._host == source:
            yield from self._here.broadcast(flat, self._hosts[source].index(root))
        if self._here.me == 0:
            options = dist.distributed_c10d.BroadcastOptions()
            options.rootRank = source
            yield from self._wait(self._across.broadcast([as_bytes(flat)], options))
        if self._host != source:
            yield from self._here.broadcast(flat, 0)

    def spread(
        self, what: str, source: Tensor | None, outputs: Sequence[Tensor | None], root: int = -1
    ) -> Steps:
        """Every rank's source to all ranks (all_gather) or to the root (gather), by gloo alone."""
        wanted = [source if root in (-1, rank) else None for rank in range(self._size)]
        return self.deal(what, wanted, outputs, root)

    def deal(
        self,
        what: str,
        sources: Sequence[Tensor | None],
        outputs: Sequence[Tensor | None],
        root: int = -1,
        whole: Tensor | None = None,
    ) -> Steps:
        """The r-th source to rank r, whose output for this rank it fills; by gloo alone."""
        nothing = torch.empty(0, dtype=torch.uint8)
        given = [nothing if one is None else as_bytes(one) for one in sources]
        into = [nothing if one is None else as_bytes(one) for one in outputs]
        sizes = [[len(one) for one in side] for side in (into, given)]
        received = torch.empty(sum(sizes[0]), dtype=torch.uint8)
        yield from self._wait(self._inner.alltoall_base(received, torch.cat(given), *sizes))
        for target, piece in zip(into, received.split(sizes[0]), strict=True):
            target.copy_(piece)

    def barrier(self) -> Steps:
        """Nothing but waiting."""
        yield from self._here.barrier()
        if self._here.me == 0:
            yield from self._wait(self._across.barrier())
        yield from self._here.barrier()


def by_host(names: Sequence[str]) -> list[list[int]]:
    """The ranks of each host, in the order of their first ranks."""
    return [[rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]


def positions(hosts: Sequence[Sequence[int]], me: int) -> tuple[int, list[int]] | None:
    """This rank's position on its host and the ranks with the same one on the others; None where it has no partner."""
    position = next(ranks.index(me) for ranks in hosts if me in ranks)
    equal = len({len(ranks) for ranks in hosts}) == 1
    if position > 0 and not equal:
        return None
    return position, [ranks[position] for ranks in hosts]
