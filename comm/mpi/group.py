"""The process group: torch.distributed's calls as non-blocking MPI operations.

Counting bytes is not done here (collectives.py does it for every library).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ScatterOptions,
)

from xtrain.base.errors import BackendError
from xtrain.comm.mpi.base import GroupOfRanks
from xtrain.comm.mpi.buffers import Reduction, Transfer, check, name_of, parts, spec, told
from xtrain.comm.mpi.work import MpiWork
from xtrain.comm.mpi.world import current
from xtrain.comm.transfer import as_in_memory, describe
from xtrain.comm.work import AllWorks, op_and_timeout


class MpiProcessGroup(GroupOfRanks):
    """The calls of torch.distributed: arguments as in torch, a list of tensors holding one unless it says more."""

    # Reductions.

    def _reduce_into(
        self, transfer: Transfer, tensor: Tensor, op: Any, call: Callable[[Tensor, Reduction], Any]
    ) -> Callable[[], Any]:
        """Prepare an in-place reduction of one tensor; returns what starts it."""
        reduction = Reduction(op, tensor.dtype, self._size, transfer.what)
        target = check(tensor, transfer.what)
        if reduction.dtype == target.dtype and reduction.as_it_is and as_in_memory(target):
            buffer = transfer.writing(target)
            transfer.after.append(_later(reduction, buffer))
        else:
            buffer = reduction.prepare(target)
            transfer.keep += [target, buffer]
            transfer.after += [_later(reduction, buffer), lambda: target.copy_(buffer)]
        return lambda: call(buffer, reduction)

    def allreduce(self, tensors: Any, opts: Any = None, timeout: timedelta | None = None) -> MpiWork:
        """Each tensor reduced over the group, in place."""
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        op, timeout = op_and_timeout(opts, timeout)
        transfer = Transfer("all_reduce")

        def call(buffer: Tensor, reduction: Reduction) -> Any:
            return self._comm.Iallreduce(MPI.IN_PLACE, spec(buffer, reduction.datatype), reduction.mpi_op)

        starts = [self._reduce_into(transfer, tensor, op, call) for tensor in tensors]
        say = told(transfer.what, tensors, name_of(op))
        return self._submit(
            transfer, tensors, lambda: [start() for start in starts], tensors, timeout, told=say
        )

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """All tensors reduced over the group, in place, as one operation."""
        return self.allreduce(tensors, opts)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """The sum (or another operation) on the root; the other ranks' tensors stay as they are."""
        opts = opts or ReduceOptions()
        (tensor,), transfer, root = tensors, Transfer("reduce"), opts.rootRank
        if self._me == root:

            def call(buffer: Tensor, reduction: Reduction) -> Any:
                return self._comm.Ireduce(
                    MPI.IN_PLACE, spec(buffer, reduction.datatype), reduction.mpi_op, root=root
                )

            start = self._reduce_into(transfer, tensor, opts.reduceOp, call)
        else:
            reduction = Reduction(opts.reduceOp, tensor.dtype, self._size, transfer.what)
            sent = transfer.reading(reduction.prepare(check(tensor, transfer.what)))

            def start() -> Any:
                return self._comm.Ireduce(spec(sent, reduction.datatype), None, reduction.mpi_op, root=root)

        say = told(transfer.what, tensors, f"{name_of(opts.reduceOp)} on rank {self._ranks[root]}")
        return self._submit(transfer, tensors, lambda: [start()], tensors, opts.timeout, told=say)

    def _scatter_sum(
        self, transfer: Transfer, output: Tensor, flat: Tensor, counts: list[int], op: Any
    ) -> Callable[[], Any]:
        """Prepare one reduce-scatter of a flat input whose r-th piece has counts[r] elements."""
        reduction = Reduction(op, output.dtype, self._size, transfer.what)
        if sum(counts) != flat.numel() or counts[self._me] != output.numel() or flat.dtype != output.dtype:
            raise BackendError(
                f"{self._place()}: {transfer.what} of {describe([flat])} cannot leave {describe([output])} "
                f"on each of {self._size} ranks"
            )
        if reduction.dtype == output.dtype:
            target = buffer = transfer.writing(output)
        else:
            target = transfer.writing(output)
            buffer = torch.empty(output.numel(), dtype=reduction.dtype)
        sent = transfer.reading(reduction.prepare(check(flat, transfer.what)), apart_from=buffer)
        transfer.keep.append(buffer)
        first: list[Callable[[], Any]] = [_later(reduction, buffer)]
        if buffer is not target:
            first.append(lambda: target.copy_(buffer.view(target.shape)))
        transfer.after[:0] = first
        return lambda: self._comm.Ireduce_scatter(
            spec(sent, reduction.datatype), spec(buffer, reduction.datatype), counts, reduction.mpi_op
        )

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> MpiWork:
        """The r-th tensor of every rank's list reduced into rank r's output."""
        op, timeout = op_and_timeout(opts, None)
        transfers = []
        starts = []
        for output, pieces in zip(outputs, inputs, strict=True):
            one = Transfer("reduce_scatter")
            flat = one.reading_list(pieces)
            starts.append(self._scatter_sum(one, output, flat, [piece.numel() for piece in pieces], op))
            transfers.append(one)
        tensors = [piece for pieces in inputs for piece in pieces]
        say = told("reduce_scatter", tensors, name_of(op))
        return self._submit(
            _merged(transfers), tensors, lambda: [start() for start in starts], outputs, timeout, told=say
        )

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> MpiWork:
        """Several inputs of n times their output's elements, as one operation."""
        op, timeout = op_and_timeout(opts, None)
        transfers = [Transfer("reduce_scatter") for _ in outputs]
        starts = [
            self._scatter_sum(one, output, source, [output.numel()] * self._size, op)
            for one, output, source in zip(transfers, outputs, inputs, strict=True)
        ]
        say = told("reduce_scatter", inputs, name_of(op))
        return self._submit(
            _merged(transfers), inputs, lambda: [start() for start in starts], outputs, timeout, told=say
        )

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> MpiWork:
        """Rank r's slice of the sum of all inputs, in `output`."""
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    # Moving.

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> MpiWork:
        """The root's tensor on every rank."""
        opts = opts or BroadcastOptions()
        transfer = Transfer("broadcast")
        (tensor,) = tensors
        buffer = transfer.reading(tensor) if self._me == opts.rootRank else transfer.writing(tensor)
        return self._submit(
            transfer,
            tensors,
            lambda: [self._comm.Ibcast(spec(buffer), root=opts.rootRank)],
            tensors,
            opts.timeout,
            told=told(transfer.what, tensors, f"from rank {self._ranks[opts.rootRank]}"),
        )

    def _gather_whole(self, transfer: Transfer, output: Tensor, source: Tensor) -> Callable[[], Any]:
        if output.numel() != self._size * source.numel() or output.dtype != source.dtype:
            raise BackendError(
                f"{self._place()}: {transfer.what} of {describe([source])} from {self._size} ranks does not "
                f"fit into {describe([output])}"
            )
        buffer = transfer.writing(output)
        own = buffer.data_ptr() + self._me * source.nbytes
        if as_in_memory(source) and source.data_ptr() == own:
            return lambda: self._comm.Iallgather(
                MPI.IN_PLACE, [*spec(buffer)[:1], source.numel(), spec(buffer)[2]]
            )
        sent = transfer.reading(source, apart_from=buffer)
        return lambda: self._comm.Iallgather(spec(sent), [spec(buffer)[0], sent.numel(), spec(buffer)[2]])

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> MpiWork:
        """Every rank's inputs, one after the other in the outputs, as one operation."""
        transfer = Transfer("all_gather")
        starts = [
            self._gather_whole(transfer, output, source)
            for output, source in zip(outputs, inputs, strict=True)
        ]
        timeout = opts.timeout if opts is not None else None
        say = told(transfer.what, outputs)
        return self._submit(
            transfer, outputs, lambda: [start() for start in starts], outputs, timeout, told=say
        )

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> MpiWork:
        """Every rank's input, one after the other in `output`."""
        return self.all_gather_single_coalesced([output], [source], opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """Every rank's input in the tensors of a list; sizes may differ between ranks."""
        transfer, calls = Transfer("all_gather"), []
        for pieces, source in zip(outputs, inputs, strict=True):
            buffer = transfer.writing_list(pieces)
            sent = transfer.reading(source, apart_from=buffer)
            counts = [piece.numel() for piece in pieces]
            calls.append(lambda s=sent, b=buffer, c=counts: self._comm.Iallgatherv(spec(s), parts(b, c)))
        flat = [piece for pieces in outputs for piece in pieces]
        timeout = (opts or AllgatherOptions()).timeout
        say = told(transfer.what, flat)
        return self._submit(transfer, flat, lambda: [call() for call in calls], flat, timeout, told=say)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> MpiWork:
        """Several inputs: the i-th tensor of the r-th list is rank r's i-th input."""
        return self.allgather([list(pieces) for pieces in zip(*outputs, strict=True)], inputs, opts)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """Every rank's input in the root's list."""
        opts = opts or GatherOptions()
        transfer, root = Transfer("gather"), opts.rootRank
        (source,) = inputs
        if self._me == root:
            pieces = outputs[0]
            buffer = transfer.writing_list(pieces)
            received: Any = parts(buffer, [piece.numel() for piece in pieces])
            sent = transfer.reading(source, apart_from=buffer)
        else:
            pieces, received, sent = [], None, transfer.reading(source)
        return self._submit(
            transfer,
            pieces or inputs,
            lambda: [self._comm.Igatherv(spec(sent), received, root=root)],
            pieces,
            opts.timeout,
            told=told(transfer.what, inputs, f"on rank {self._ranks[root]}", sizes=False),
        )

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> MpiWork:
        """The r-th tensor of the root's list in rank r's output."""
        opts = opts or ScatterOptions()
        transfer, root = Transfer("scatter"), opts.rootRank
        (output,) = outputs
        buffer = transfer.writing(output)
        sent: Any = None
        if self._me == root:
            flat = transfer.reading_list(inputs[0])
            flat = transfer.reading(flat, apart_from=buffer)
            sent = parts(flat, [piece.numel() for piece in inputs[0]])
        return self._submit(
            transfer,
            outputs,
            lambda: [self._comm.Iscatterv(sent, spec(buffer), root=root)],
            outputs,
            opts.timeout,
            told=told(transfer.what, outputs, f"from rank {self._ranks[root]}", sizes=False),
        )

    def all_to_all_single(
        self,
        output: Tensor,
        source: Tensor,
        output_splits: Any = None,
        input_splits: Any = None,
        opts: Any = None,
    ) -> MpiWork:
        """The r-th piece of `source` goes to rank r; pieces are counted in rows, equal ones by default."""
        transfer = Transfer("all_to_all")
        received = self._rows(output, output_splits, transfer.what)
        given = self._rows(source, input_splits, transfer.what)
        buffer = transfer.writing(output)
        sent = transfer.reading(source, apart_from=buffer)
        return self._submit(
            transfer,
            [source],
            lambda: [self._comm.Ialltoallv(parts(sent, given), parts(buffer, received))],
            [output],
            (opts or AllToAllOptions()).timeout,
            told=told(transfer.what, [source], sizes=False),
        )

    def _rows(self, tensor: Tensor, splits: Any, what: str) -> list[int]:
        """Elements of each piece."""
        rows = tensor.shape[0] if tensor.ndim else 1
        row = tensor.numel() // rows if rows else 0
        pieces = [int(piece) for piece in splits] if splits else [rows // self._size] * self._size
        if sum(pieces) != rows or len(pieces) != self._size:
            raise BackendError(
                f"{self._place()}: {what}: pieces of {pieces} rows are not the {rows} rows of {describe([tensor])} "
                f"over {self._size} ranks"
            )
        return [piece * row for piece in pieces]

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> MpiWork:
        """The r-th input goes to rank r; the r-th output comes from it."""
        transfer = Transfer("all_to_all")
        buffer = transfer.writing_list(outputs)
        sent = transfer.reading(transfer.reading_list(inputs), apart_from=buffer)
        given, received = [[tensor.numel() for tensor in side] for side in (inputs, outputs)]
        return self._submit(
            transfer,
            inputs,
            lambda: [self._comm.Ialltoallv(parts(sent, given), parts(buffer, received))],
            outputs,
            (opts or AllToAllOptions()).timeout,
            told=told(transfer.what, inputs, sizes=False),
        )

    def barrier(self, opts: Any = None, timeout: timedelta | None = None) -> MpiWork:
        """Done when every rank has called it."""
        timeout = timeout or (opts or BarrierOptions()).timeout
        return self._submit(
            Transfer("barrier"), [], lambda: [self._comm.Ibarrier()], [], timeout, told="barrier"
        )

    def monitored_barrier(self, timeout: timedelta | None = None, wait_all_ranks: bool = False) -> None:
        """A barrier that names who is missing, in groups of up to 17 ranks; in larger ones the names are those of the
        ranks through which the others are asked. `wait_all_ranks` changes nothing.

        Raises:
            BackendError: some rank did not come in time.
        """
        seconds = self._timeout if timeout is None else timeout.total_seconds()
        self._monitored += 1  # what came too late for an earlier one must not count for this one
        missing = self._world.meet(self._ranks, f"barrier {self._monitored} of {self._key}", seconds)
        if missing:
            raise BackendError(
                f"{self._place()}: monitored_barrier in {self!r}: nothing came from rank "
                f"{', '.join(map(str, missing))} within {seconds:g} s"
            )

    # Point to point.

    def send(self, tensors: list[Tensor], dst: int, tag: int = 0) -> MpiWork:
        """Send one tensor to rank `dst` of the group."""
        transfer = Transfer(f"send to rank {self._ranks[dst]}")
        (tensor,) = tensors
        sent = transfer.reading(tensor)
        return self._submit(
            transfer, tensors, lambda: [self._comm.Isend(spec(sent), dst, tag)], tensors, peer=dst
        )

    def recv(self, tensors: list[Tensor], src: int, tag: int = 0) -> MpiWork:
        """Receive one tensor from rank `src` of the group."""
        return self._receive(Transfer(f"recv from rank {self._ranks[src]}"), tensors, src, tag, src)

    def recv_anysource(self, tensors: list[Tensor], tag: int = 0) -> MpiWork:
        """Receive one tensor from whoever sends first; `source_rank()` of the work says who."""
        return self._receive(Transfer("recv from any rank"), tensors, MPI.ANY_SOURCE, tag, -1)

    def _receive(self, transfer: Transfer, tensors: list[Tensor], src: int, tag: int, peer: int) -> MpiWork:
        (tensor,) = tensors
        buffer = transfer.writing(tensor)
        return self._submit(
            transfer, tensors, lambda: [self._comm.Irecv(spec(buffer), src, tag)], tensors, peer=peer
        )

    # Several calls as one piece of work.

    def _start_coalescing(self, device: torch.device) -> None:
        self._open = []

    def _end_coalescing(self, device: torch.device) -> AllWorks:
        works, self._open = self._open or [], None
        return AllWorks(works)

    # The names of torch before 2.13.
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single


def _later(reduction: Reduction, buffer: Tensor) -> Callable[[], None]:
    return lambda: reduction.complete(buffer)


def _merged(transfers: list[Transfer]) -> Transfer:
    whole = Transfer(transfers[0].what)
    for transfer in transfers:
        whole.keep += transfer.keep
        whole.after += transfer.after
    return whole


def create(options: Any, _: Any) -> MpiProcessGroup:
    """For torch: the process group of `options`, made by its ranks alone."""
    world = current()
    ranks = list(options.global_ranks_in_group)
    whole = not ranks
    ranks = ranks or list(range(world.size))
    key = world.next_key(ranks)
    comm = world.subset(ranks, key, options.timeout.total_seconds())
    assert whole or comm.Get_rank() == options.group_rank
    return MpiProcessGroup(options.store, world, comm, ranks, key, options.group_id, options.timeout)
