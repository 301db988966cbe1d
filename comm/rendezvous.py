"""Where ranks meet before their process group is made: who comes, with which library; later, who has ended.

A store is all that is needed: four questions a rank to meet, whatever their number. Libraries that meet elsewhere (MPI)
have their own ways.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from xtrain.base.errors import BackendError
from xtrain.comm import store as run_store
from xtrain.comm import tcp_store
from xtrain.comm.store.client import RunStore
from xtrain.comm.whereabouts import Whereabouts

_NAMED = 16
"""Ranks that a message lists at most."""
_TOLD = 4
"""Ranks of which a message says where they are."""
_NAP = 0.01
_ASKED = 512
"""Ranks of a group whose end is looked for at most."""
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_held: Counter[str] = Counter()
"""How often this process's ranks have met at each address: torchrun's store keeps the keys of earlier times."""


def first_line(error: BaseException) -> str:
    """What an error says, without the rest that C++ adds."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def listed(ranks: Sequence[int]) -> str:
    """ "rank 1" or "ranks 1, 3", cut where there are many."""
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_NAMED]))}{more}"


def told_absent(absent: Mapping[int, str]) -> str:
    """Who has not come to an operation, in words.

    Args:
        absent: the ranks, and what each was last known to wait for; empty where that is not known.
    """
    if not absent:
        return "all ranks have begun it, and one is stuck"
    elsewhere = {rank: where for rank, where in absent.items() if where}
    said = f"{listed(sorted(absent))} {'has' if len(absent) == 1 else 'have'} not come to it"
    for rank, where in sorted(elsewhere.items())[:_TOLD]:
        said += f"; rank {rank} was last seen waiting for {where}"
    return said


def let_all_read(store: dist.Store, key: str, rank: int, size: int, patience: float) -> None:
    """Before an error that may end rank 0, and the store with it: the others want to say the same."""
    with suppress(RuntimeError):  # the store is gone already, and with it the reason to wait
        read, until = store.add(key, 1), time.monotonic() + patience
        while rank == 0 and read < size and time.monotonic() < until:
            time.sleep(_NAP)
            read = store.add(key, 0)


def _host() -> str:
    """The same for processes that see each other's numbers, and for no others."""
    parts = [platform.node()]
    with suppress(OSError):  # not Linux: the name must do
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _runs(pid: int) -> bool:
    """Whether a process of this host is alive; one that waits to be collected by its parent is not."""
    status = Path(f"/proc/{pid}/stat")
    if status.exists():
        with suppress(OSError, IndexError):  # it ends at this moment
            return status.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not Path("/proc/self/stat").exists()


def open_store(
    library: str, init_method: str | None, rank: int, world_size: int, timeout: timedelta
) -> tuple[dist.Store, int, int]:
    """The run's store (XTRAIN_STORE), or one at MASTER_ADDR and MASTER_PORT (init_method None), or where `init_method`
    says; rank and world size.

    Raises:
        BackendError: it cannot be reached or opened; names library, rank, address and cause.
    """
    if init_method is not None:
        store, rank, world_size = next(iter(dist.rendezvous(init_method, rank, world_size, timeout=timeout)))
        return store, rank, world_size
    if os.environ.get(_AGENT_STORE) == "True":
        # torchrun's own, also where it was started by a rank that has a run's store.
        store, _, _ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=timeout)))
        return store, rank, world_size
    if run_store.is_stated():
        return run_store.from_environment(timeout), rank, world_size
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"backend {library}, rank {rank} of {world_size}"
    try:
        opened = tcp_store.open_master if rank == 0 else tcp_store.open_client
        return opened(host, port, world_size, timeout), rank, world_size
    except RuntimeError as error:
        cause = first_line(error)
        if "EADDRINUSE" in cause or "in use" in cause:
            why = "another program uses the port: set MASTER_PORT (or distributed_port) to a free one on every rank"
        elif "timed out" in cause.lower() or "refused" in cause:
            why = (
                f"rank 0 does not listen there after {timeout.total_seconds():g} s: it has ended, has another "
                "MASTER_ADDR or MASTER_PORT, or has chosen a library that meets elsewhere (mpi)"
            )
        elif "reset by peer" in cause or "recv" in cause:
            why = f"another program listens there, not rank 0 of a job ({cause}): set MASTER_PORT to a free port"
        else:
            why = cause
        raise BackendError(f"{place} cannot start at {host}:{port}: {why}") from error


class Rendezvous:
    """All ranks of a job at a store, which they keep to tell each other of their end.

    Args:
        address: of the store.
        library: what this rank is about to start.
    """

    def __init__(self, store: dist.Store, address: str, library: str, rank: int, world_size: int) -> None:
        self._address, number = address, _held[address]
        self._keys, self._is_run_store = (
            dist.PrefixStore(f"default_pg/{number}", store),
            isinstance(store, RunStore),
        )
        self._store = dist.PrefixStore(f"xtrain/{number}", store)
        self._library, self._rank, self._size = library, rank, world_size
        self._hosts: dict[int, tuple[str, int]] = {}
        self._here = _host()
        self.whereabouts = Whereabouts(self._store, rank)

    def join(self, timeout: timedelta) -> None:
        """Wait for all ranks.

        Raises:
            BackendError: on every rank, when they have chosen different libraries (says who has which), or some do
                not come in time (says which).
        """
        store, chosen = self._store, os.environ.get("XTRAIN_BACKEND") or os.environ.get("DS_ACCELERATOR")
        about = {"library": self._library, "by": chosen, "host": self._here, "pid": os.getpid()}
        try:
            store.set(f"rank {self._rank}", json.dumps(about))
            # Whoever differs from rank 0 says so, so that nobody has to read what all have.
            store.wait(["rank 0"], timeout)
            if self._about(0)["library"] != self._library:
                store.set(f"differs {store.add('differing', 1)}", str(self._rank))
            if store.add("arrived", 1) == self._size:
                store.set("all", "1")
            store.wait(["all"], timeout)
            differing = int(store.add("differing", 0))
        except RuntimeError as error:
            text = self._missing(timeout, error)
            let_all_read(store, "read", self._rank, self._size, 1.0)
            raise BackendError(text) from error
        if differing:
            text = self._different(differing)
            let_all_read(store, "read", self._rank, self._size, timeout.total_seconds())
            raise BackendError(text)
        _held[self._address] += 1  # only together, so that ranks agree after one that failed

    def group_store(self, timeout: timedelta) -> dist.Store:
        """The store for the process group that they are about to make: apart from that of other starts.

        Raises:
            BackendError: see `store.environment.group_store`.
        """
        if not self._is_run_store:
            return self._keys
        return run_store.group_store(self._keys, self._library, self._rank, self._size, timeout)

    def _about(self, rank: int) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._store.get(f"rank {rank}"))
        return found

    def _place(self) -> str:
        return f"backend {self._library}, rank {self._rank} of {self._size}"

    def _missing(self, timeout: timedelta, error: RuntimeError) -> str:
        seconds = f"{timeout.total_seconds():g} s"
        try:
            absent = [r for r in range(min(self._size, _ASKED)) if not self._store.check([f"rank {r}"])]
        except RuntimeError:
            return f"{self._place()}: rank 0, which keeps the store, has ended ({first_line(error)})"
        if not absent:
            return f"{self._place()} could not meet the others within {seconds}: {first_line(error)}"
        return (
            f"{self._place()}: nothing came from {listed(absent)} within {seconds}: ended, slow, started with another "
            "MASTER_ADDR or MASTER_PORT, or with a library that meets elsewhere (mpi)"
        )

    def _different(self, differing: int) -> str:
        ranks = sorted(int(self._store.get(f"differs {i}")) for i in range(1, min(differing, _NAMED) + 1))
        choices: dict[str, list[int]] = {}
        for rank in [0, *ranks]:
            about = self._about(rank)
            name = about["library"] + (f" (XTRAIN_BACKEND is {about['by']})" if about["by"] else "")
            choices.setdefault(name, []).append(rank)
        if self._rank not in [0, *ranks]:
            choices[next(iter(choices))].append(self._rank)
        said = "; ".join(f"{listed(ranks)} {name}" for name, ranks in choices.items())
        more = f" and {differing - _NAMED} more that differ" if differing > _NAMED else ""
        return (
            f"{self._place()}: the ranks have chosen different process-group libraries: {said}{more}: give every rank "
            'the same backend (config, XTRAIN_BACKEND or init_distributed("…"))'
        )

    def leave(self) -> None:
        """This process ends: whoever waits for it can say so."""
        with suppress(RuntimeError):  # rank 0 may have gone with the store, and then everybody sees that
            self._store.set(f"gone {self._rank}", "1")

    def gone(self, ranks: Sequence[int], patience: float = 2.0) -> list[int]:
        """Which of the ranks have ended, looked for up to `patience` seconds: a connection breaks a little earlier
        than its process is gone. Ranks of other hosts that were killed cannot be told from those that run."""
        others = [rank for rank in ranks if rank != self._rank][:_ASKED]
        until = time.monotonic() + patience
        while True:
            try:
                found = [rank for rank in others if self._has_ended(rank)]
            except RuntimeError:
                # The store does not answer: rank 0 keeps it, or an agent, which ends after it. Rank 0 itself is here.
                return [0] if self._rank else []
            if found or time.monotonic() > until:
                return found
            time.sleep(0.05)

    def _has_ended(self, rank: int) -> bool:
        if rank not in self._hosts and self._store.check([f"rank {rank}"]):
            about = self._about(rank)
            self._hosts[rank] = about["host"], int(about["pid"])
        host, pid = self._hosts.get(rank, ("", 0))
        if host == self._here and not _runs(pid):
            return True
        return bool(self._store.check([f"gone {rank}"]))


current: Rendezvous | None = None
"""Of the running process group; None for one that met elsewhere or was started without xtrain."""


def check_same(what: str, mine: str, group: dist.ProcessGroup | None = None) -> None:
    """Compare a choice that all ranks must share. Collective over the group.

    Raises:
        BackendError: on every rank, when they differ; says who has which.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    everyone: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    if len(set(everyone)) == 1:
        return
    choices: dict[str, list[int]] = {}
    for rank, choice in enumerate(everyone):
        choices.setdefault(choice, []).append(rank)
    said = "; ".join(f"{listed(ranks)} {choice}" for choice, ranks in choices.items())
    raise BackendError(
        f"rank {dist.get_rank(group)}: the ranks have chosen different {what}s: {said}: give every rank the same one"
    )
