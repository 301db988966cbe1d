"""This process among all MPI processes: communicators, meeting before a group is made, and leaving in order.

Does not move tensors (group.py) and does not know torch's groups.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI

from xtrain.base.errors import BackendError
from xtrain.comm.meeting import listed, told_absent
from xtrain.comm.mpi.progress import Progress
from xtrain.comm.mpi.store import Client, Departures, MpiStore, Server

_MEETING_TAGS = range(16384, 32768)
_FAN_OUT = 16
_GRACE = 15.0
"""Seconds that a rank which must abort gives the others to say what they have seen."""

_SAYING = 1.5
"""Seconds that the other ranks get to say where they are when something is wrong."""

_worlds: list[World] = []


class World:
    """All processes, in torch's order of ranks.

    Args:
        comm: every process; rank r of it is torch's rank r.
    """

    def __init__(self, comm: Any) -> None:
        self.progress = Progress()
        self.comm = comm
        self.control = comm.Dup()
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.begun: dict[str, int] = {}
        self.starts = 0
        self._stores: list[dist.Store] = []
        self._made: dict[str, int] = {}
        self._process = os.getpid()
        self._server = Server(self.control, self.progress) if self.rank == 0 else None
        self._client = None if self.rank == 0 else Client(self.control, self.progress)
        atexit.register(self._leave)

    def new_store(self, timeout: timedelta) -> dist.Store:
        """The store for one init_process_group; its keys are apart from those of earlier ones."""
        self.starts += 1
        whole = MpiStore(self._client, timeout) if self._client is not None else self._keys(timeout)
        self._stores.append(whole)  # C++ would forget that it is a Python object
        return dist.PrefixStore(f"start{self.starts}", whole)

    def _keys(self, timeout: timedelta) -> dist.Store:
        assert self._server is not None
        self._server.keys.set_timeout(timeout)
        return self._server.keys

    def _ask(self, question: str, *arguments: Any) -> Any:
        if self._server is not None:
            return getattr(self._server, question)(self.rank, *arguments)
        assert self._client is not None
        return self._client.ask(question, *arguments, margin=2.0)

    def departed(self, ranks: Sequence[int], waiting: str) -> Departures:
        """Which of the ranks have ended, and how many collectives they had begun in each group.

        Args:
            waiting: what this rank waits for, in words; others may ask.
        """
        return dict(self._ask("departed", list(ranks), (dict(self.begun), waiting)))

    def absent(self, ranks: Sequence[int], key: str, number: int, waiting: str) -> str:
        """Which of the ranks have not come to a group's collective of that number, in words.

        Every rank that waits for more than a second has said so; those that have come just now get a little time.
        """
        until = time.monotonic() + _SAYING
        try:
            while True:
                found = self._ask("absent", list(ranks), key, number, (dict(self.begun), waiting))
                if not found or time.monotonic() > until:
                    return told_absent(found)
                self.progress.poll()
                time.sleep(0.05)
        except BackendError as error:
            return f"a rank did not join in or is stuck ({error})"

    def calls(self, ranks: Sequence[int], key: str, number: int, told: str) -> str:
        """Which of the ranks make which call as a group's collective of that number, in words."""
        until = time.monotonic() + _SAYING
        try:
            while True:
                found: dict[str, list[int]] = self._ask("calls", key, number, told)
                if sum(map(len, found.values())) == len(ranks) or time.monotonic() > until:
                    return "; ".join(f"{listed(who)} {call}" for call, who in found.items())
                time.sleep(0.02)
        except BackendError as error:
            return f"this rank {told} ({error})"

    def next_key(self, ranks: Sequence[int]) -> str:
        """A name for a new group on which its ranks agree without asking: they count the groups that they make.

        torch's own names differ between ranks after a `new_group(..., use_local_synchronization=True)`.
        """
        listed = ",".join(map(str, ranks))
        self._made[listed] = self._made.get(listed, 0) + 1
        return f"group {self._made[listed]} of {listed}"

    def meet(self, ranks: Sequence[int], name: str, timeout: float) -> list[int]:
        """Wait until all of `ranks` are here, along a tree of messages; returns those that were missed.

        A rank misses its children in the tree, or its parent, so that "missing" may stand for ranks beyond.

        Args:
            name: what they meet for; different for every meeting of the same ranks.
        """
        me, tag = ranks.index(self.rank), _MEETING_TAGS[zlib.crc32(name.encode()) % len(_MEETING_TAGS)]
        children = [ranks[i] for i in range(_FAN_OUT * me + 1, min(_FAN_OUT * me + 1 + _FAN_OUT, len(ranks)))]
        parent = ranks[(me - 1) // _FAN_OUT] if me else None
        empty = [bytearray(0), MPI.BYTE]
        until = time.monotonic() + timeout
        with self.progress.lock:
            arrivals = [self.control.Irecv(empty, child, tag) for child in children]
        missing = self._missing(arrivals, children, until)
        if missing:
            return missing
        if parent is not None:
            with self.progress.lock:
                both = [self.control.Isend(empty, parent, tag), self.control.Irecv(empty, parent, tag)]
            if self._missing(both, [parent, parent], until):
                return [parent]
        with self.progress.lock:
            sends = [self.control.Isend(empty, child, tag) for child in children]
        return self._missing(sends, children, until)

    def _missing(self, requests: list[Any], ranks: Sequence[int], until: float) -> list[int]:
        done = self.progress.complete(requests, max(0.0, until - time.monotonic()))
        with self.progress.lock:
            for request, arrived in zip(requests, done, strict=True):
                if not arrived:
                    request.Cancel()
                    request.Free()
        return [rank for rank, arrived in zip(ranks, done, strict=True) if not arrived]

    def subset(self, ranks: Sequence[int], key: str, timeout: float) -> Any:
        """A communicator of `ranks` (in that order) without involving any other process.

        Raises:
            BackendError: some of them do not make it within `timeout` seconds.
        """
        missing = self.meet(ranks, key, timeout)
        if missing:
            raise BackendError(
                f"backend mpi, rank {self.rank} of {self.size}: a group of ranks {list(ranks)} was not made "
                f"within {timeout:g} s: nothing came from rank{'s' * (len(missing) > 1)} "
                f"{', '.join(map(str, missing))}; every rank of a group must make it"
            )
        with self.progress.lock:
            chosen = self.comm.Get_group().Incl(list(ranks))
            return self.comm.Create_group(chosen, tag=zlib.crc32(key.encode()) % 32768)

    def _leave(self) -> None:
        """At the end of the process: tell rank 0, which tells those who wait for this rank; then let MPI end.

        MPI cannot end while an operation is incomplete: then the job is aborted, after the others had time
        to finish their part or to report what they were waiting for.
        """
        if os.getpid() != self._process or MPI.Is_finalized():
            return
        try:
            incomplete = self._farewell()
        except BackendError as error:
            print(f"xtrain: {error}", file=sys.stderr, flush=True)
            incomplete = self.progress.incomplete()
        if incomplete:
            print(
                f"xtrain: backend mpi, rank {self.rank} of {self.size}: {incomplete} operations are incomplete at "
                "the end of the process, which MPI cannot finalize: aborting the job",
                file=sys.stderr,
                flush=True,
            )
            MPI.COMM_WORLD.Abort(1)

    def _farewell(self) -> int:
        """Say goodbye, and wait as long as it makes sense; returns how many operations remain."""
        if self._client is not None:
            self._client.ask("depart", self.begun)
        else:
            assert self._server is not None
            self._server.depart(0, self.begun)
        until = time.monotonic() + _GRACE
        while True:
            incomplete = self.progress.incomplete()
            if self._client is not None:
                done = incomplete == 0 or self._client.ask("all_gone")
            else:  # answers the others until the last has gone; MPI's own end would wait for them as well
                assert self._server is not None
                done = self._server.all_gone()
            if done or (incomplete and time.monotonic() > until):
                break
            time.sleep(0.002 if self._server is not None else 0.05)
        if self._server is not None:
            self._server.stop()
        return incomplete


def join(rank: int, world_size: int, timeout: timedelta) -> World:
    """This process's world, made at the first call; later calls check that it is the one expected.

    Raises:
        BackendError: MPI has another number of processes than expected, or ranks are not 0 to n-1.
    """
    expected_rank, expected_size = _expected(rank, world_size)
    size = MPI.COMM_WORLD.Get_size()
    if expected_size is not None and expected_size != size:
        how = "mpiexec did not start this process" if size == 1 else f"MPI's own world has {size}"
        raise BackendError(
            f"backend mpi, rank {expected_rank if expected_rank is not None else MPI.COMM_WORLD.Get_rank()}: "
            f"{expected_size} ranks were asked for (by argument or WORLD_SIZE), but {how}: "
            f"start with `mpiexec -n {expected_size}` (or srun), and leave RANK and WORLD_SIZE unset"
        )
    if not _worlds:
        wish = MPI.COMM_WORLD.Get_rank() if expected_rank is None else expected_rank
        _wait_for_all(timeout)
        comm = MPI.COMM_WORLD.Split(0, wish)
        if comm.Get_rank() != wish:
            raise BackendError(
                f"backend mpi, rank {wish} of {size}: the ranks that were asked for are not 0 to {size - 1}, "
                "each once: leave RANK unset, so that MPI numbers the processes"
            )
        _worlds.append(World(comm))
        _set_environment(comm)
    return _worlds[0]


def current() -> World:
    """The world that `join` made."""
    if not _worlds:
        raise BackendError(
            "backend mpi: start it with xtrain.comm.init_distributed('mpi'), not through torch"
        )
    return _worlds[0]


def _expected(rank: int, world_size: int) -> tuple[int | None, int | None]:
    if rank >= 0 and world_size > 0:
        return rank, world_size
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return None, None


def _wait_for_all(timeout: timedelta) -> None:
    arrived = MPI.COMM_WORLD.Ibarrier()
    until = time.monotonic() + timeout.total_seconds()
    while not arrived.Test():
        if time.monotonic() > until:
            raise BackendError(
                f"backend mpi, rank {MPI.COMM_WORLD.Get_rank()} of {MPI.COMM_WORLD.Get_size()}: not every process "
                f"of the job came to init_distributed within {timeout.total_seconds():g} s"
            )
        time.sleep(0.001)


def _set_environment(comm: Any) -> None:
    """What scripts read that were written for torchrun."""
    host = comm.Split_type(MPI.COMM_TYPE_SHARED)
    for name, value in (
        ("RANK", comm.Get_rank()),
        ("WORLD_SIZE", comm.Get_size()),
        ("LOCAL_RANK", host.Get_rank()),
        ("LOCAL_WORLD_SIZE", host.Get_size()),
    ):
        os.environ.setdefault(name, str(value))
    host.Free()
