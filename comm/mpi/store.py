"""torch.distributed's key-value store over MPI: rank 0 keeps the keys, the others ask it by message.

No port and no file. torch itself reads little from it (barriers after start-up, when asked for); scripts and
libraries may. Rank 0 also keeps the list of ranks that have ended, for those that wait for them.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from mpi4py import MPI

from xtrain.base.errors import BackendError
from xtrain.comm.mpi.progress import Progress

_REQUEST = 1
_REPLIES = range(16, 16384)
_LONGEST_NAP = 0.005
_MARGIN = 10.0
"""Seconds beyond its own patience after which a rank concludes that rank 0 does not answer at all."""

_NEED_KEYS = {
    "get": lambda key: [key],
    "multi_get": lambda keys: keys,
    "wait": lambda keys, *_: keys,
}

Departures = dict[int, dict[str, int]]
"""Rank that has ended: group: how many collectives it had begun there."""


Position = tuple[dict[str, int], str]
"""Where a rank is: group: how many collectives it has begun there; and what it waits for, in words."""


class Server:
    """Rank 0's side: the keys, where ranks are, those that have ended, and a thread that answers the others."""

    def __init__(self, comm: Any, progress: Progress) -> None:
        self.keys = dist.HashStore()
        self.departures: Departures = {}
        self._positions: dict[int, Position] = {}
        self._calls: dict[tuple[str, int], dict[int, str]] = {}
        self._comm, self._progress = comm, progress
        self._parked: list[tuple[int, int, str, tuple[Any, ...], float]] = []
        self._sends: list[tuple[Any, bytes]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="xtrain-mpi-store", daemon=True)
        self._thread.start()

    def depart(self, rank: int, begun: dict[str, int]) -> None:
        """Rank `rank` takes part in nothing any more."""
        self.departures[rank] = begun

    def departed(self, rank: int, ranks: Sequence[int], position: Position) -> Departures:
        """Which of the ranks have ended; `rank`, who asks, waits at `position`."""
        self._positions[rank] = position
        return {one: begun for one, begun in list(self.departures.items()) if one in ranks}

    def absent(
        self, rank: int, ranks: Sequence[int], key: str, number: int, position: Position
    ) -> dict[int, str]:
        """Which of the ranks are not known to have begun a group's collective of that number: what each waits for."""
        self._positions[rank] = position
        known = {one: self._positions.get(one, ({}, "")) for one in ranks}
        return {one: where for one, (begun, where) in known.items() if begun.get(key, 0) < number}

    def calls(self, rank: int, key: str, number: int, told: str) -> dict[str, list[int]]:
        """What the ranks that have said so call as a group's collective of that number: call: ranks."""
        said = self._calls.setdefault((key, number), {})
        said[rank] = told
        by_call: dict[str, list[int]] = {}
        for one, call in sorted(said.items()):
            by_call.setdefault(call, []).append(one)
        return by_call

    def all_gone(self) -> bool:
        """Whether every rank has ended."""
        return len(self.departures) == self._comm.Get_size()

    def stop(self) -> None:
        """End the thread once its answers have been sent: MPI may only end without it."""
        self._stopping = True
        self._thread.join(_MARGIN)

    def _run(self) -> None:
        nap = 0.0
        while not self._stopping or self._sends:
            request = self._next()
            if request is None:
                nap = min(_LONGEST_NAP, nap + 0.0001)
                time.sleep(nap)
            else:
                nap = 0.0
                self._parked.append(request)
            waiting, self._parked = self._parked, []
            for item in waiting:
                if not self._answer(*item):
                    self._parked.append(item)
            with self._progress.lock:
                self._sends = [(send, data) for send, data in self._sends if not send.Test()]

    def _next(self) -> tuple[int, int, str, tuple[Any, ...], float] | None:
        status = MPI.Status()
        with self._progress.lock:
            message = self._comm.Improbe(MPI.ANY_SOURCE, _REQUEST, status)
            if message is None:
                return None
            data = bytearray(status.Get_count(MPI.BYTE))
            message.Recv([data, MPI.BYTE])
        number, operation, arguments, patience = pickle.loads(data)
        return status.Get_source(), number, operation, arguments, time.monotonic() + patience

    def _answer(
        self, source: int, number: int, operation: str, arguments: tuple[Any, ...], until: float
    ) -> bool:
        """Answer a request unless its keys are still missing and there is time."""
        late = time.monotonic() > until
        try:
            if operation == "depart":
                self.depart(source, *arguments)
                value: Any = None
            elif operation in ("departed", "absent", "calls"):
                value = getattr(self, operation)(source, *arguments)
            elif operation == "all_gone":
                value = self.all_gone()
            else:
                needed = _NEED_KEYS[operation](*arguments) if operation in _NEED_KEYS else []
                if needed and not self.keys.check(needed):
                    if not late:
                        return False
                    raise dist.DistStoreError(f"keys {needed} were not set in time")
                value = None if operation == "wait" else getattr(self.keys, operation)(*arguments)
            answer: tuple[int, bool, Any] = (number, True, value)
        except Exception as error:  # belongs to the one who asked
            answer = (number, False, str(error))
        data = pickle.dumps(answer)
        with self._progress.lock:
            self._sends.append((self._comm.Isend([data, MPI.BYTE], source, _reply_tag(number)), data))
        return True


class Client:
    """The other ranks' side: a question to rank 0 and its answer. Any number of threads may ask at once."""

    def __init__(self, comm: Any, progress: Progress) -> None:
        self._comm, self._progress = comm, progress
        self._numbers = itertools.count()
        self._unanswered: list[tuple[Any, bytes]] = []

    def ask(self, operation: str, *arguments: Any, patience: float = 0.0, margin: float = _MARGIN) -> Any:
        """Rank 0's answer, which may take `patience` seconds where the keys are not there yet.

        Raises:
            torch.distributed.DistStoreError: rank 0 could not do it, or the keys did not come in time.
            BackendError: rank 0 does not answer within `patience + margin` seconds.
        """
        number = next(self._numbers)
        data = pickle.dumps((number, operation, arguments, patience))
        with self._progress.lock:
            send = self._comm.Isend([data, MPI.BYTE], 0, _REQUEST)
        until = time.monotonic() + patience + margin
        nap = 0.0
        while True:
            answer = self._answer_to(number)
            if answer is not None:
                break
            if time.monotonic() > until:
                self._unanswered.append((send, data))  # MPI may still read it
                raise BackendError(
                    f"backend mpi, rank {self._comm.Get_rank()}: rank 0, which keeps the store, did not answer "
                    f"{operation!r} within {patience + margin:g} s: it has ended or is stuck outside Python"
                )
            self._progress.poll()
            nap = min(0.002, nap + 0.00005)
            time.sleep(nap)
        with self._progress.lock:
            send.Wait()  # answered, so it has arrived
        well, value = answer
        if not well:
            raise dist.DistStoreError(f"store over MPI, rank {self._comm.Get_rank()}, {operation}: {value}")
        return value

    def _answer_to(self, number: int) -> tuple[bool, Any] | None:
        """The answer if it is there; late ones to questions that were given up are thrown away."""
        status = MPI.Status()
        with self._progress.lock:
            message = self._comm.Improbe(0, _reply_tag(number), status)
            if message is None:
                return None
            data = bytearray(status.Get_count(MPI.BYTE))
            message.Recv([data, MPI.BYTE])
        answered, well, value = pickle.loads(data)
        return (well, value) if answered == number else None


def _reply_tag(number: int) -> int:
    return _REPLIES[number % len(_REPLIES)]


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


class MpiStore(dist.Store):
    """torch's Store on the ranks other than 0: every call is a question to rank 0."""

    def __init__(self, client: Client, timeout: timedelta) -> None:
        super().__init__()
        self._client = client
        self.set_timeout(timeout)  # C++ keeps it, and groups and prefixes read it there

    @property
    def timeout(self) -> timedelta:
        """How long `get` and `wait` may wait for a key; see `set_timeout`."""
        stated: timedelta = super().timeout  # type: ignore[misc]  # torch's stubs lack it
        return stated

    def set(self, key: str, value: bytes | str) -> None:
        """Set a key."""
        self._client.ask("set", key, _bytes(value))

    def get(self, key: str) -> bytes:
        """A key's value, waiting for it."""
        return bytes(self._client.ask("get", key, patience=self.timeout.total_seconds()))

    def add(self, key: str, value: int) -> int:
        """Add to a counter; its new value."""
        return int(self._client.ask("add", key, value))

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Set a key if it has the expected value; its value afterwards."""
        return bytes(self._client.ask("compare_set", key, _bytes(expected), _bytes(desired)))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        return bool(self._client.ask("check", keys))

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all keys exist."""
        patience = (self.timeout if timeout is None else timeout).total_seconds()
        self._client.ask("wait", keys, patience=patience)

    def delete_key(self, key: str) -> bool:
        """Delete a key; whether it was there."""
        return bool(self._client.ask("delete_key", key))

    def num_keys(self) -> int:
        """How many keys there are."""
        return int(self._client.ask("num_keys"))

    # As torch's C++ side calls them.
    deleteKey = delete_key
    getNumKeys = num_keys

    def clone(self) -> dist.Store:
        """Another handle on the same keys: this one, which any number of threads may use."""
        return self

    def has_extended_api(self) -> bool:
        """append, multi_get and multi_set exist."""
        return True

    def append(self, key: str, value: bytes | str) -> None:
        """Append to a key's value."""
        self._client.ask("append", key, _bytes(value))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Several values, waiting for all."""
        return [
            bytes(value)
            for value in self._client.ask("multi_get", keys, patience=self.timeout.total_seconds())
        ]

    def multi_set(self, keys: list[str], values: list[bytes | str]) -> None:
        """Set several keys."""
        self._client.ask("multi_set", keys, [_bytes(value) for value in values])
