"""What every call of the MPI process group needs: who is in it, starting an operation, knowing when it is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from xtrain.base.errors import BackendError
from xtrain.comm.mpi.buffers import Transfer
from xtrain.comm.mpi.calls import Check
from xtrain.comm.mpi.progress import Operation
from xtrain.comm.mpi.work import MpiWork
from xtrain.comm.mpi.world import World
from xtrain.comm.transfer import describe

# torch declares some calls of a group in three forms, of which a subclass has to answer one.
_ProcessGroup: Any = dist.ProcessGroup

_SURELY_GONE = 5.0
"""Seconds after which a message from or to a rank that has ended will not come any more."""


class GroupOfRanks(_ProcessGroup):
    """A group of ranks with a communicator of its own.

    Args:
        store: torch's store for the group.
        world: all processes.
        comm: the group's communicator.
        ranks: their numbers in the world.
        key: the same for all of them, and different for every group that they make.
        name: torch's name of the group.
        timeout: how long an operation may wait.
    """

    def __init__(
        self,
        store: dist.Store,
        world: World,
        comm: Any,
        ranks: list[int],
        key: str,
        name: str,
        timeout: timedelta,
    ) -> None:
        super().__init__(comm.Get_rank(), comm.Get_size())
        self._store = store
        self._world, self._comm, self._ranks, self._name = world, comm, ranks, name
        self._me, self._size = comm.Get_rank(), comm.Get_size()
        self._timeout = timeout.total_seconds()
        self._key = key
        self._monitored = 0
        self._broken: BaseException | None = None
        self._open: list[MpiWork] | None = None
        self._unfinished: list[Operation] = []

    # What torch asks a group about itself.

    def getBackendName(self) -> str:
        """For torch's C++ side."""
        return "mpi4py"

    def name(self) -> str:
        """The backend's name."""
        return "mpi4py"

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

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """The end of the group: nothing may be called any more. Collective over it."""
        if self._broken is None and all(operation.done for operation in self._unfinished):
            with self._world.progress.lock:
                self._comm.Free()
        self._broken = self._broken or BackendError(f"group {self._name!r} was destroyed")

    abort = shutdown

    # Starting operations.

    def _place(self) -> str:
        return f"backend mpi, rank {self._world.rank} of {self._world.size}"

    def _submit(
        self,
        transfer: Transfer,
        tensors: Sequence[Tensor],
        start: Callable[[], list[Any]],
        outputs: list[Tensor],
        timeout: timedelta | None = None,
        peer: int | None = None,
        told: str = "",
    ) -> MpiWork:
        """Start MPI's part and follow it.

        Args:
            peer: the other rank (in the group) where there is only one, -1 for any.
            told: of a collective, what must be the same on all ranks.
        """
        if self._broken is not None:
            raise BackendError(
                f"{self._place()}: {transfer.what} on a group that is unusable: {self._broken}"
            )
        what = f"{self._place()}: {transfer.what} of {describe(tensors)} in {self!r}"
        number, check = 0, None
        with self._world.progress.lock:
            if peer is None:
                self._world.begun[self._key] = number = self._world.begun.get(self._key, 0) + 1
            try:
                if peer is None and self._size > 1:
                    check = Check(self._comm, told)
                requests = start()
            except MPI.Exception as error:
                raise BackendError(f"{what} could not start in MPI: {error}") from error
        seconds = timeout.total_seconds() if timeout is not None else 0.0
        operation = Operation(
            what,
            requests,
            [*transfer.keep, *tensors],
            transfer.after,
            outputs,
            seconds if seconds > 0 else self._timeout,
            lambda waited: self._lost(number, peer, waited, what),
            self._fail,
            check,
            lambda: self._world.calls(self._ranks, self._key, number, told),
            lambda: self._absent(number, peer, what),
        )
        self._unfinished = [old for old in self._unfinished if not old.done]
        self._unfinished.append(operation)
        self._world.progress.submit(operation)
        work = MpiWork(operation, self._world.progress)
        if self._open is not None:
            self._open.append(work)
        return work

    def _fail(self, error: BaseException) -> None:
        self._broken = self._broken or error

    def _absent(self, number: int, peer: int | None, what: str) -> str:
        """Who has not come, when time is up."""
        if peer is None:
            return self._world.absent(self._ranks, self._key, number, _bare(what))
        return f"{'no rank has' if peer < 0 else f'rank {self._ranks[peer]} has not'} done its part"

    def _lost(self, number: int, peer: int | None, waited: float, what: str) -> str | None:
        """Why an operation can never end: a rank has ended that had not begun it."""
        if peer is None:
            gone = self._world.departed(self._ranks, _bare(what))
            guilty = [rank for rank, begun in gone.items() if begun.get(self._key, 0) < number]
        else:
            asked = (
                [rank for rank in self._ranks if rank != self._world.rank]
                if peer < 0
                else [self._ranks[peer]]
            )
            gone = self._world.departed(asked, _bare(what))
            guilty = list(gone) if len(gone) == len(asked) and waited > _SURELY_GONE else []
        if not guilty:
            return None
        return f"rank {', '.join(map(str, sorted(guilty)))} has ended without taking part"

    def __repr__(self) -> str:
        ranks = f"ranks {self._ranks}" if self._size <= 8 else f"{self._size} ranks from {self._ranks[0]}"
        return f"group {self._name!r} ({ranks})"

    __hash__ = dist.ProcessGroup.__hash__


def _bare(what: str) -> str:
    """An operation without the place that says so."""
    return what.partition(": ")[2]
