"""The process group: torch.distributed's calls over shared memory.

What has no path here (messages between two ranks, dtypes that torch does not add) goes to a gloo group of the same
ranks. Counting bytes is not done here (collectives.py does it for every library).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ScatterOptions,
)

from xtrain.comm import transfer as buffers
from xtrain.comm.process_group import BackgroundProcessGroup
from xtrain.comm.reduce_op import op_and_timeout
from xtrain.comm.shm import arena
from xtrain.comm.shm.exchange import Exchange
from xtrain.comm.shm.hosts import Hosts
from xtrain.comm.shm.progress import Lane, Operation, progress
from xtrain.comm.shm.reduction import has
from xtrain.comm.work import AllWorks, BackgroundWork


class Transfer(buffers.Transfer):
    """The buffers of one call."""

    backend = "shm"


class ShmProcessGroup(BackgroundProcessGroup):
    """The calls of torch.distributed: arguments as in torch, a list of tensors holding one unless it says more.

    Args:
        exchange: moves and adds, between ranks of one host or of several.
        inner: a gloo group of the same ranks, for all that `exchange` cannot do.
        store, me, ranks, name, timeout: see `BackgroundProcessGroup`.
    """

    registered = "shm"

    def __init__(
        self,
        store: dist.Store,
        me: int,
        ranks: list[int],
        name: str,
        timeout: timedelta,
        exchange: Exchange | Hosts,
        inner: Any,
    ) -> None:
        super().__init__(store, me, ranks, name, timeout)
        self.exchange, self.inner = exchange, inner
        self._lane = Lane(exchange.window.lost, exchange.window.absent, exchange.doze, self._fail)

    def set_timeout(self, timeout: timedelta) -> None:
        """For operations from now on."""
        super().set_timeout(timeout)
        self.inner.set_timeout(timeout)

    def _release(self) -> None:
        self.exchange.window.close()

    def zeros(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor that the other ranks of the host read where it is."""
        return arena.own().zeros(elements, dtype)

    # Starting operations.

    def place(self) -> str:
        return f"backend shm, rank {self._ranks[self._me]}"

    def _submit(
        self,
        transfer: Transfer,
        tensors: Sequence[Tensor],
        steps: Iterator[None],
        outputs: list[Tensor],
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> dist.Work:
        """Begin an operation. The tensors stay alive with it."""
        seconds = self._begin(transfer, getattr(opts, "timeout", None) if timeout is None else timeout)
        operation = Operation(_What(self, transfer, tensors), steps, transfer.after, outputs, seconds)
        progress.submit(self._lane, operation, background=getattr(opts, "asyncOp", True))
        return self._begun(BackgroundWork(operation, progress))

    def _fail(self, error: BaseException) -> None:
        if self._broken is None:
            self._broken = error
            self.exchange.window.fail(str(error))

    # Reductions.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Each tensor reduced over the group, in place."""
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        op, timeout = op_and_timeout(opts, timeout)
        if not all(has(op, tensor.dtype) for tensor in tensors):
            return self.inner.allreduce(tensors, op)
        transfer = Transfer("all_reduce")
        flats = [transfer.writing(tensor).view(-1) for tensor in tensors]
        steps = [self.exchange.all_reduce(flat, op) for flat in flats]
        return self._submit(transfer, tensors, _chain(steps), tensors, opts, timeout)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """The sum (or another operation) on the root; the other ranks' tensors stay as they are."""
        opts = opts or ReduceOptions()
        (tensor,), transfer, root = tensors, Transfer("reduce"), opts.rootRank
        if not has(opts.reduceOp, tensor.dtype):
            return self.inner.reduce(tensors, opts)
        flat = (transfer.writing(tensor) if self._me == root else transfer.reading(tensor)).view(-1)
        steps = self.exchange.all_reduce(flat, opts.reduceOp, root)
        return self._submit(transfer, tensors, steps, tensors, opts)

    def _scatter_sum(
        self, transfer: Transfer, output: Tensor, flat: Tensor, counts: Sequence[int], op: Any
    ) -> Iterator[None]:
        """One reduce-scatter of a flat input whose r-th piece has counts[r] elements."""
        self._check_scattered(transfer.what, flat, output, counts)
        out = transfer.writing(output).view(-1)
        start = sum(counts[: self._me])
        own_piece = flat[start : start + len(out)].data_ptr() == out.data_ptr()
        flat = flat if own_piece else transfer.reading(flat, apart_from=out)
        return self.exchange.reduce_scatter(out, flat, counts, op)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> dist.Work:
        """The r-th tensor of every rank's list reduced into rank r's output."""
        op, timeout = op_and_timeout(opts, None)
        if not all(has(op, output.dtype) for output in outputs):
            return self.inner.reduce_scatter(outputs, inputs, op)
        transfer = Transfer("reduce_scatter")
        steps = [
            self._scatter_sum(
                transfer,
                output,
                transfer.reading_list(pieces).view(-1),
                [piece.numel() for piece in pieces],
                op,
            )
            for output, pieces in zip(outputs, inputs, strict=True)
        ]
        return self._submit(transfer, outputs, _chain(steps), outputs, opts, timeout)

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Several inputs of n times their output's elements, as one operation."""
        op, timeout = op_and_timeout(opts, None)
        if not all(has(op, output.dtype) for output in outputs):
            works = [
                self.inner._reduce_scatter_base(output, source, op)
                for output, source in zip(outputs, inputs, strict=True)
            ]
            return AllWorks(works)
        transfer = Transfer("reduce_scatter")
        steps = [
            self._scatter_sum(
                transfer, output, transfer.reading(source).view(-1), [output.numel()] * self._size, op
            )
            for output, source in zip(outputs, inputs, strict=True)
        ]
        return self._submit(transfer, inputs, _chain(steps), outputs, opts, timeout)

    # Moving.

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """The root's tensor on every rank."""
        opts = opts or BroadcastOptions()
        transfer, root = Transfer("broadcast"), opts.rootRank
        (tensor,) = tensors
        flat = (transfer.reading(tensor) if self._me == root else transfer.writing(tensor)).view(-1)
        return self._submit(transfer, tensors, self.exchange.broadcast(flat, root), tensors, opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Every rank's inputs, one after the other in the outputs, as one operation."""
        transfer, steps = Transfer("all_gather"), []
        for output, source in zip(outputs, inputs, strict=True):
            self._check_gathered(transfer.what, source, output)
            flat = transfer.writing(output).view(-1)
            own = flat[self._me * source.numel() : (self._me + 1) * source.numel()]
            mine = (
                source.detach().view(-1) if self._is(source, own) else transfer.reading(source, flat).view(-1)
            )
            steps.append(self.exchange.all_gather(flat, mine))
        return self._submit(transfer, outputs, _chain(steps), outputs, opts)

    @staticmethod
    def _is(tensor: Tensor, place: Tensor) -> bool:
        return tensor.is_contiguous() and tensor.data_ptr() == place.data_ptr()

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Every rank's input in the tensors of a list; sizes may differ between ranks."""
        transfer, steps = Transfer("all_gather"), []
        for pieces, source in zip(outputs, inputs, strict=True):
            into = [transfer.writing(piece).view(-1) for piece in pieces]
            mine = transfer.reading(source, into[self._me]).view(-1)
            steps.append(self.exchange.spread("all_gather", mine, into))
        flat = [piece for pieces in outputs for piece in pieces]
        return self._submit(transfer, flat, _chain(steps), flat, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Every rank's input in the root's list."""
        opts = opts or GatherOptions()
        transfer, root = Transfer("gather"), opts.rootRank
        pieces = outputs[0] if self._me == root else []
        into: list[Tensor | None] = [transfer.writing(piece).view(-1) for piece in pieces]
        mine = transfer.reading(inputs[0], into[root] if into else None).view(-1)
        steps = self.exchange.spread("gather", mine, into or [None] * self._size, root)
        return self._submit(transfer, pieces or inputs, steps, pieces, opts)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> dist.Work:
        """The r-th tensor of the root's list in rank r's output."""
        opts = opts or ScatterOptions()
        transfer, root, size = Transfer("scatter"), opts.rootRank, self._size
        out = transfer.writing(outputs[0]).view(-1)
        given: list[Tensor | None] = [None] * size
        if self._me == root:
            given = [transfer.reading(piece, out).view(-1) for piece in inputs[0]]
        into = [out if member == root else None for member in range(size)]
        return self._submit(
            transfer, outputs, self.exchange.deal("scatter", given, into, root), outputs, opts
        )

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: Any = None,
        input_splits: Any = None,
        opts: Any = None,
    ) -> dist.Work:
        """The r-th piece of `source` goes to rank r; pieces are counted in rows, equal ones by default."""
        received = self._pieces("all_to_all", output, output_splits)
        given = self._pieces("all_to_all", source, input_splits)
        transfer = Transfer("all_to_all")
        out = transfer.writing(output).view(-1)
        flat = transfer.reading(source, apart_from=out).view(-1)
        steps = self.exchange.deal(
            "all_to_all", flat.split(given), out.split(received), whole=None if input_splits else flat
        )
        return self._submit(transfer, [source], steps, [output], opts)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """The r-th input goes to rank r; the r-th output comes from it."""
        transfer = Transfer("all_to_all")
        into = [transfer.writing(output).view(-1) for output in outputs]
        given = [transfer.reading(source).view(-1) for source in inputs]
        return self._submit(transfer, inputs, self.exchange.deal("all_to_all", given, into), outputs, opts)

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Done when every rank has called it."""
        opts = opts or BarrierOptions()
        return self._submit(Transfer("barrier"), [], self.exchange.barrier(), [], opts, timeout)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names who is missing: gloo's.

        Raises:
            RuntimeError: some rank did not come in time.
        """
        self.inner.monitored_barrier(timeout or timedelta(seconds=self._timeout), wait_all_ranks)

    # Point to point.

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> dist.Work:
        """Send one tensor to rank `dst` of the group."""
        return self.inner.send([buffers.plain(tensor) for tensor in tensors], dst, tag)

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> dist.Work:
        """Receive one tensor from rank `src` of the group."""
        return self.inner.recv(tensors, src, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        """Receive one tensor from whoever sends first; `source_rank()` of the work says who."""
        return self.inner.recv_anysource(tensors, tag)


class _What:
    """An operation's name and sizes, put into words when somebody asks."""

    def __init__(self, group: ShmProcessGroup, transfer: Transfer, tensors: Sequence[Tensor]) -> None:
        self._group, self._transfer, self._tensors = group, transfer, tensors

    def __str__(self) -> str:
        return f"{self._group.place()}: {self._group.in_words(self._transfer, self._tensors)}"


def _chain(steps: Sequence[Iterator[None]]) -> Iterator[None]:
    """One after the other."""
    if len(steps) == 1:
        return steps[0]
    return (pause for one in steps for pause in one)
