"""What xtrain's own process groups, over MPI and over shared memory, have in common.

What torch asks a group about itself, the calls that follow from others, and the checks of their arguments. How an
operation begins, goes on and is lost, each library adds (mpi/group.py, shm/group.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from xtrain.base.errors import BackendError
from xtrain.comm.transfer import Transfer, describe
from xtrain.comm.work import AllWorks

# torch declares some calls of a group in three forms, of which a subclass has to answer one.
_ProcessGroup: Any = dist.ProcessGroup

_OLD_NAMES = {
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
    "_allgather_base": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "alltoall_base": "all_to_all_single",
}
"""torch's names before 2.13."""

W = TypeVar("W", bound=dist.Work)


class BackgroundProcessGroup(_ProcessGroup):
    """A group of ranks whose operations go on in the background.

    Args:
        store: torch's store for the group.
        me: this process's rank in the group.
        ranks: the members' numbers in the world.
        name: torch's name of the group.
        timeout: how long an operation may wait.

    Attributes:
        registered: the library's name in torch.distributed.
    """

    registered = ""

    def __init_subclass__(cls) -> None:
        for old, new in _OLD_NAMES.items():
            setattr(cls, old, getattr(cls, new))

    def __init__(self, store: dist.Store, me: int, ranks: list[int], name: str, timeout: timedelta) -> None:
        super().__init__(me, len(ranks))
        self._store, self._me, self._ranks, self._name = store, me, ranks, name
        self._size = len(ranks)
        self._timeout = timeout.total_seconds()
        self._broken: BaseException | None = None
        self._open: list[dist.Work] | None = None

    # What torch asks a group about itself.

    def getBackendName(self) -> str:
        """For torch's C++ side."""
        return self.registered

    def name(self) -> str:
        """The backend's name."""
        return self.registered

    @property
    def group_name(self) -> str:
        """torch's name of the group."""
        return self._name

    def get_group_store(self) -> dist.Store:
        """torch's store for the group."""
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        """For operations from now on."""
        self._timeout = timeout.total_seconds()

    def _set_default_timeout(self, timeout: timedelta) -> None:
        self.set_timeout(timeout)

    def shutdown(self) -> None:
        """The end of the group: nothing may be called any more. Over MPI collective."""
        if self._broken is None:
            self._broken = BackendError(f"group {self._name!r} was destroyed")
            self._release()

    abort = shutdown

    def _release(self) -> None:
        """Give back what the library holds for the group."""
        raise NotImplementedError

    def __repr__(self) -> str:
        ranks = f"ranks {self._ranks}" if self._size <= 8 else f"{self._size} ranks from {self._ranks[0]}"
        return f"group {self._name!r} ({ranks})"

    __hash__ = dist.ProcessGroup.__hash__

    # Starting operations.

    def place(self) -> str:
        """Who says so, for messages."""
        raise NotImplementedError

    def in_words(self, transfer: Transfer, tensors: Sequence[Tensor]) -> str:
        """A call's name and sizes, for messages."""
        size = f" of {describe(tensors)}" if tensors else ""
        return f"{transfer.what}{size} in {self!r}"

    def _begin(self, transfer: Transfer, timeout: timedelta | None) -> float:
        """How many seconds the call may take.

        Raises:
            BackendError: the group is unusable.
        """
        if self._broken is not None:
            raise BackendError(f"{self.place()}: {transfer.what} on a group that is unusable: {self._broken}")
        seconds = timeout.total_seconds() if timeout is not None else 0.0
        return seconds if seconds > 0 else self._timeout

    def _begun(self, work: W) -> W:
        """What a call returns."""
        if self._open is not None:
            self._open.append(work)
        return work

    # Several calls as one piece of work.

    def _start_coalescing(self, device: torch.device) -> None:
        self._open = []

    def _end_coalescing(self, device: torch.device) -> AllWorks:
        works, self._open = self._open or [], None
        return AllWorks(works)

    # Calls that follow from others.

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """All tensors reduced over the group, in place, as one operation."""
        return self.allreduce(tensors, opts)

    def reduce_scatter_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        """Rank r's slice of the sum of all inputs, in `output`."""
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    def all_gather_single(self, output: Tensor, source: Tensor, opts: Any = None) -> dist.Work:
        """Every rank's input, one after the other in `output`."""
        return self.all_gather_single_coalesced([output], [source], opts)

    def allgather_coalesced(
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> dist.Work:
        """Several inputs: the i-th tensor of the r-th list is rank r's i-th input."""
        return self.allgather([list(pieces) for pieces in zip(*outputs, strict=True)], inputs, opts)

    # Checks of arguments: each raises BackendError.

    def _check_scattered(self, what: str, flat: Tensor, output: Tensor, counts: Sequence[int]) -> None:
        """That a flat input has pieces of `counts` elements, and this rank's fits into its output."""
        if sum(counts) != flat.numel() or counts[self._me] != output.numel() or flat.dtype != output.dtype:
            raise BackendError(
                f"{self.place()}: {what} of {describe([flat])} cannot leave {describe([output])} "
                f"on each of {self._size} ranks"
            )

    def _check_gathered(self, what: str, source: Tensor, output: Tensor) -> None:
        """That the output has room for every rank's input."""
        if output.numel() != self._size * source.numel() or output.dtype != source.dtype:
            raise BackendError(
                f"{self.place()}: {what} of {describe([source])} from {self._size} ranks does not "
                f"fit into {describe([output])}"
            )

    def _pieces(self, what: str, tensor: Tensor, splits: Any) -> list[int]:
        """Elements of each rank's piece of a tensor, whose rows are split equally or as `splits` says."""
        rows = tensor.shape[0] if tensor.ndim else 1
        row = tensor.numel() // rows if rows else 0
        pieces = [int(piece) for piece in splits] if splits else [rows // self._size] * self._size
        if sum(pieces) != rows or len(pieces) != self._size:
            raise BackendError(
                f"{self.place()}: {what}: pieces of {pieces} rows are not the {rows} rows of {describe([tensor])} "
                f"over {self._size} ranks"
            )
        return [piece * row for piece in pieces]
