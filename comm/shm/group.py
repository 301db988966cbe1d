"""The process group: torch.distributed's calls over shared memory.

What has no path here (messages between two ranks, dtypes that torch does not add) goes to a gloo group of the same
ranks. Counting bytes is not done here (collectives.py does it for every library).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import (
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ScatterOptions,
)

from xtrain.base.errors import BackendError
from xtrain.comm.shm.base import Call, GroupOfRanks, chain
from xtrain.comm.shm.reduction import has
from xtrain.comm.transfer import plain
from xtrain.comm.work import AllWorks, op_and_timeout


class ShmProcessGroup(GroupOfRanks):
    """The calls of torch.distributed: arguments as in torch, a list of tensors holding one unless it says more."""

    # Reductions.

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Each tensor reduced over the group, in place."""
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        op, timeout = op_and_timeout(opts, timeout)
        if not all(has(op, tensor.dtype) for tensor in tensors):
            return self.inner.allreduce(tensors, op)
        call = Call("all_reduce")
        flats = [call.writing(tensor).view(-1) for tensor in tensors]
        steps = [self.exchange.all_reduce(flat, op) for flat in flats]
        return self._submit(call, tensors, chain(steps), tensors, opts, timeout)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """All tensors reduced over the group, in place, as one operation."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """The sum (or another operation) on the root; the other ranks' tensors stay as they are."""
        opts = opts or ReduceOptions()
        (tensor,), call, root = tensors, Call("reduce"), opts.rootRank
        if not has(opts.reduceOp, tensor.dtype):
            return self.inner.reduce(tensors, opts)
        flat = (call.writing(tensor) if self._me == root else call.reading(tensor)).view(-1)
        steps = self.exchange.all_reduce(flat, opts.reduceOp, root)
        return self._submit(call, tensors, steps, tensors, opts)

    def _scatter_sum(
        self, call: Call, output: Tensor, flat: Tensor, counts: Sequence[int], op: Any
    ) -> Iterator[None]:
        """One reduce-scatter of a flat input whose r-th piece has counts[r] elements."""
        if sum(counts) != flat.numel() or counts[self._me] != output.numel() or flat.dtype != output.dtype:
            raise BackendError(
                f"{self.place()}: {call.what} of {flat.numel()} elements ({flat.dtype}) cannot leave "
                f"{output.numel()} ({output.dtype}) on each of {self._size} ranks"
            )
        out = call.writing(output).view(-1)
        start = sum(counts[: self._me])
        own_piece = flat[start : start + len(out)].data_ptr() == out.data_ptr()
        flat = flat if own_piece else call.reading(flat, apart_from=out)
        return self.exchange.reduce_scatter(out, flat, counts, op)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> dist.Work:
        """The r-th tensor of every rank's list reduced into rank r's output."""
        op, timeout = op_and_timeout(opts, None)
        if not all(has(op, output.dtype) for output in outputs):
            return self.inner.reduce_scatter(outputs, inputs, op)
        call = Call("reduce_scatter")
        steps = [
            self._scatter_sum(
                call, output, call.reading_list(pieces).view(-1), [piece.numel() for piece in pieces], op
            )
            for output, pieces in zip(outputs, inputs, strict=True)
        ]
        return self._submit(call, outputs, chain(steps), outputs, opts, timeout)

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
        call = Call("reduce_scatter")
        steps = [
            self._scatter_sum(call, output, call.reading(source).view(-1), [output.numel()] * self._size, op)
            for output, source in zip(outputs, inputs, strict=True)
        ]
        return self._submit(call, inputs, chain(steps), outputs, opts, timeout)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        """Rank r's slice of the sum of all inputs, in `output`."""
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    # Moving.

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """The root's tensor on every rank."""
        opts = opts or BroadcastOptions()
        call, root = Call("broadcast"), opts.rootRank
        (tensor,) = tensors
        flat = (call.reading(tensor) if self._me == root else call.writing(tensor)).view(-1)
        return self._submit(call, tensors, self.exchange.broadcast(flat, root), tensors, opts)

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Every rank's inputs, one after the other in the outputs, as one operation."""
        call, steps = Call("all_gather"), []
        for output, source in zip(outputs, inputs, strict=True):
            if output.numel() != self._size * source.numel() or output.dtype != source.dtype:
                raise BackendError(
                    f"{self.place()}: all_gather of {source.numel()} elements ({source.dtype}) from "
                    f"{self._size} ranks does not fit into {output.numel()} ({output.dtype})"
                )
            flat = call.writing(output).view(-1)
            own = flat[self._me * source.numel() : (self._me + 1) * source.numel()]
            mine = source.detach().view(-1) if self._is(source, own) else call.reading(source, flat).view(-1)
            steps.append(self.exchange.all_gather(flat, mine))
        return self._submit(call, outputs, chain(steps), outputs, opts)

    @staticmethod
    def _is(tensor: Tensor, place: Tensor) -> bool:
        return tensor.is_contiguous() and tensor.data_ptr() == place.data_ptr()

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        """Every rank's input, one after the other in `output`."""
        return self.all_gather_single_coalesced([output], [source], opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Every rank's input in the tensors of a list; sizes may differ between ranks."""
        call, steps = Call("all_gather"), []
        for pieces, source in zip(outputs, inputs, strict=True):
            into = [call.writing(piece).view(-1) for piece in pieces]
            mine = call.reading(source, into[self._me]).view(-1)
            steps.append(self.exchange.spread("all_gather", mine, into))
        flat = [piece for pieces in outputs for piece in pieces]
        return self._submit(call, flat, chain(steps), flat, opts)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Several inputs: the i-th tensor of the r-th list is rank r's i-th input."""
        return self.allgather([list(pieces) for pieces in zip(*outputs, strict=True)], inputs, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Every rank's input in the root's list."""
        opts = opts or GatherOptions()
        call, root = Call("gather"), opts.rootRank
        pieces = outputs[0] if self._me == root else []
        into: list[Tensor | None] = [call.writing(piece).view(-1) for piece in pieces]
        mine = call.reading(inputs[0], into[root] if into else None).view(-1)
        steps = self.exchange.spread("gather", mine, into or [None] * self._size, root)
        return self._submit(call, pieces or inputs, steps, pieces, opts)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> dist.Work:
        """The r-th tensor of the root's list in rank r's output."""
        opts = opts or ScatterOptions()
        call, root, size = Call("scatter"), opts.rootRank, self._size
        out = call.writing(outputs[0]).view(-1)
        given: list[Tensor | None] = [None] * size
        if self._me == root:
            given = [call.reading(piece, out).view(-1) for piece in inputs[0]]
        into = [out if member == root else None for member in range(size)]
        return self._submit(call, outputs, self.exchange.deal("scatter", given, into, root), outputs, opts)

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: Any = None,
        input_splits: Any = None,
        opts: Any = None,
    ) -> dist.Work:
        """The r-th piece of `source` goes to rank r; pieces are counted in rows, equal ones by default."""
        received = self._rows(output, output_splits)
        given = self._rows(source, input_splits)
        call = Call("all_to_all")
        out = call.writing(output).view(-1)
        flat = call.reading(source, apart_from=out).view(-1)
        steps = self.exchange.deal(
            "all_to_all", flat.split(given), out.split(received), whole=None if input_splits else flat
        )
        return self._submit(call, [source], steps, [output], opts)

    def _rows(self, tensor: Tensor, splits: Any) -> list[int]:
        """Elements of each piece."""
        rows = tensor.shape[0] if tensor.ndim else 1
        row = tensor.numel() // rows if rows else 0
        pieces = [int(piece) for piece in splits] if splits else [rows // self._size] * self._size
        if sum(pieces) != rows or len(pieces) != self._size:
            raise BackendError(
                f"{self.place()}: all_to_all: pieces of {pieces} rows are not the {rows} rows of a tensor of shape "
                f"{list(tensor.shape)} over {self._size} ranks"
            )
        return [piece * row for piece in pieces]

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """The r-th input goes to rank r; the r-th output comes from it."""
        call = Call("all_to_all")
        into = [call.writing(output).view(-1) for output in outputs]
        given = [call.reading(source).view(-1) for source in inputs]
        return self._submit(call, inputs, self.exchange.deal("all_to_all", given, into), outputs, opts)

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> dist.Work:
        """Done when every rank has called it."""
        opts = opts or BarrierOptions()
        return self._submit(Call("barrier"), [], self.exchange.barrier(), [], opts, timeout)

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names who is missing: gloo's.

        Raises:
            RuntimeError: some rank did not come in time.
        """
        self.inner.monitored_barrier(timeout or timedelta(seconds=self._timeout), wait_all_ranks)

    # Point to point.

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> dist.Work:
        """Send one tensor to rank `dst` of the group."""
        return self.inner.send([plain(tensor) for tensor in tensors], dst, tag)

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> dist.Work:
        """Receive one tensor from rank `src` of the group."""
        return self.inner.recv(tensors, src, tag)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> dist.Work:
        """Receive one tensor from whoever sends first; `source_rank()` of the work says who."""
        return self.inner.recv_anysource(tensors, tag)

    # The names of torch before 2.13.
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single
