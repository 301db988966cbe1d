"""What every call of the process group needs: torch's questions about a group, and starting operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xtrain.base.errors import BackendError
from xtrain.comm import transfer
from xtrain.comm.shm import arena
from xtrain.comm.shm.exchange import Exchange
from xtrain.comm.shm.hosts import Hosts
from xtrain.comm.shm.progress import Lane, Operation, progress
from xtrain.comm.work import AllWorks, BackgroundWork

# torch declares some calls of a group in three forms, of which a subclass has to answer one.
_ProcessGroup: Any = dist.ProcessGroup


class Call(transfer.Transfer):
    """The buffers of one call."""

    backend = "shm"


class GroupOfRanks(_ProcessGroup):
    """A group of ranks.

    Args:
        store: torch's store for the group.
        me: this process's rank in the group.
        ranks: the members' numbers in the world.
        name: torch's name of the group.
        timeout: how long an operation may wait.
        exchange: moves and adds, between ranks of one host or of several.
        inner: a gloo group of the same ranks, for all that `exchange` cannot do.
    """

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
        super().__init__(me, len(ranks))
        self._store, self._me, self._ranks, self._name = store, me, ranks, name
        self._size = len(ranks)
        self._timeout = timeout.total_seconds()
        self.exchange, self.inner = exchange, inner
        self._lane = Lane(exchange.window.lost, exchange.window.absent, exchange.doze, self._fail)
        self._broken: BaseException | None = None
        self._open: list[dist.Work] | None = None

    # What torch asks a group about itself.

    def getBackendName(self) -> str:
        """For torch's C++ side."""
        return "shm"

    def name(self) -> str:
        """The backend's name."""
        return "shm"

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
        self.inner.set_timeout(timeout)

    _set_default_timeout = set_timeout

    def shutdown(self) -> None:
        """The end of the group: nothing may be called any more."""
        if self._broken is None:
            self._broken = BackendError(f"group {self._name!r} was destroyed")
            self.exchange.window.close()

    abort = shutdown

    def zeros(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor that the other ranks of the host read where it is."""
        return arena.own().zeros(elements, dtype)

    # Starting operations.

    def place(self) -> str:
        """Who says so, for messages."""
        return f"backend shm, rank {self._ranks[self._me]}"

    def _submit(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        steps: Iterator[None],
        outputs: list[Tensor],
        opts: Any = None,
        timeout: timedelta | None = None,
    ) -> dist.Work:
        """Begin an operation. The tensors stay alive with it."""
        if self._broken is not None:
            raise BackendError(f"{self.place()}: {call.what} on a group that is unusable: {self._broken}")
        limit = getattr(opts, "timeout", None) if timeout is None else timeout
        seconds = limit.total_seconds() if limit is not None else 0.0
        operation = Operation(
            _What(self, call, tensors), steps, call.after, outputs, seconds if seconds > 0 else self._timeout
        )
        progress.submit(self._lane, operation, background=getattr(opts, "asyncOp", True))
        work = BackgroundWork(operation, progress)
        if self._open is not None:
            self._open.append(work)
        return work

    def _fail(self, error: BaseException) -> None:
        if self._broken is None:
            self._broken = error
            self.exchange.window.fail(str(error))

    # Several calls as one piece of work.

    def _start_coalescing(self, device: torch.device) -> None:
        self._open = []

    def _end_coalescing(self, device: torch.device) -> AllWorks:
        works, self._open = self._open or [], None
        return AllWorks(works)

    def __repr__(self) -> str:
        ranks = f"ranks {self._ranks}" if self._size <= 8 else f"{self._size} ranks from {self._ranks[0]}"
        return f"group {self._name!r} ({ranks})"

    __hash__ = dist.ProcessGroup.__hash__


class _What:
    """An operation's name and sizes, put into words when somebody asks."""

    def __init__(self, group: GroupOfRanks, call: Call, tensors: Sequence[Tensor]) -> None:
        self._group, self._call, self._tensors = group, call, tensors

    def __str__(self) -> str:
        size = f" of {transfer.describe(self._tensors)}" if self._tensors else ""
        return f"{self._group.place()}: {self._call.what}{size} in {self._group!r}"


def chain(steps: Sequence[Iterator[None]]) -> Iterator[None]:
    """One after the other."""
    if len(steps) == 1:
        return steps[0]
    return (pause for one in steps for pause in one)
