"""torch's Store on the ranks: every call is a question to a `Server` or a `Relay`.

Any number of threads may ask at once: each takes a connection that nobody uses, or opens one, and puts it back. Forked
children open their own.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from xtrain.base.errors import BackendError
from xtrain.comm.store import frames
from xtrain.comm.store.listener import check_secret

_MARGIN = 30.0
"""Seconds beyond a request's own patience after which the store is taken to be stuck."""
_NAP = 0.05

_kept: list[dist.Store] = []
"""Every store of this process: C++ that holds one would forget that it is a Python object."""


class _Gone(dist.DistNetworkError):
    """The other side has closed the connection."""


class _Connection:
    """One connection on which both sides have proved themselves.

    Args:
        connected: to the store at `where`; this object's from now on.
    """

    def __init__(self, connected: socket.socket, where: str, secret: bytes) -> None:
        self._where, self._socket, self._number = where, connected, 0
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._prove(secret)
        except BaseException:
            self._socket.close()
            raise

    def _prove(self, secret: bytes) -> None:
        hello = self._receive(frames.HELLO)
        if hello[: len(frames.MAGIC)] != frames.MAGIC:
            raise BackendError(f"another program than the run's store listens at {self._where}")
        theirs, ours = hello[len(frames.MAGIC) :], os.urandom(frames.NONCE)
        self._socket.sendall(ours + frames.proof(secret, b"client", theirs, ours))
        try:
            proof = self._receive(frames.PROOF)
        except _Gone as error:
            raise BackendError(
                f"the run's store at {self._where} refused this process: it has another secret, or is ending"
            ) from error
        if not frames.same(proof, frames.proof(secret, b"server", theirs, ours)):
            raise BackendError(f"what listens at {self._where} does not know the secret of this run's store")

    def _receive(self, size: int) -> bytes:
        parts, missing = [], size
        while missing:
            part = self._socket.recv(min(missing, 1 << 20))
            if not part:
                raise _Gone("it has closed the connection")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def ask(self, code: int, fields: Sequence[bytes], patience: float) -> tuple[int, list[bytes]]:
        """How it went, and the fields of the answer, within `patience` seconds."""
        self._number = (self._number + 1) % 2**32
        self._socket.settimeout(patience)
        self._socket.sendall(frames.pack(self._number, code, fields))
        size = frames.length(self._receive(frames.LENGTH.size))
        number, went, answer = frames.unpack(self._receive(size))
        if number != self._number:
            raise frames.FrameError(f"request {self._number} got the answer to {number}")
        return went, answer

    def close(self) -> None:
        """Close it; a request that waits there is forgotten."""
        self._socket.close()

    __del__ = close


class _Connections:
    """Of one process to one store. `deque` is what makes it safe: taking and putting back are one step each."""

    def __init__(self, host: str, port: int, secret: bytes) -> None:
        self.host, self.port, self._secret = host, port, check_secret(secret)
        self._idle: deque[_Connection] = deque()
        self._process = os.getpid()

    def _connected(self, patience: float) -> _Connection:
        connected = socket.create_connection((self.host, self.port), patience)
        return _Connection(connected, f"{self.host}:{self.port}", self._secret)

    def open(self, patience: float) -> None:
        """Open the first one, waiting up to `patience` seconds for a store that has not begun to listen."""
        until = time.monotonic() + patience
        while True:
            try:
                left = max(_NAP, until - time.monotonic())
                self._idle.append(self._connected(left))
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise dist.DistNetworkError(
                        f"the run's store at {self.host}:{self.port} was not reached within {patience:g} s: {error}"
                    ) from error
            time.sleep(_NAP)

    def ask(self, code: int, fields: Sequence[bytes], patience: float) -> list[bytes]:
        """The answer's fields.

        Raises:
            torch.distributed.DistStoreError: keys did not come in time, or the request makes no sense.
            torch.distributed.DistNetworkError: the store has gone, or does not answer.
        """
        if os.getpid() != self._process:  # forked: the connections are the parent's
            self._idle, self._process = deque(), os.getpid()
        limit = patience + _MARGIN
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = None
        try:
            if connection is None:
                connection = self._connected(_MARGIN)
            went, answer = connection.ask(code, fields, limit)
        except TimeoutError as error:
            raise dist.DistNetworkError(
                f"the run's store at {self.host}:{self.port} did not answer within {limit:g} s"
            ) from error
        except (OSError, _Gone, frames.FrameError, BackendError) as error:
            raise dist.DistNetworkError(
                f"the run's store at {self.host}:{self.port} has gone, or cannot be used: {error}"
            ) from error
        # Whatever was raised above, KeyboardInterrupt included, may have left half an answer on the way: only a
        # connection that has answered is used again.
        self._idle.append(connection)
        if went != frames.DONE:
            raise dist.DistStoreError(answer[0].decode(errors="replace"))
        return answer


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


class RunStore(dist.Store):
    """The keys of the run.

    Args:
        host, port: of the server, or of this host's relay.
        secret: of the run.
        timeout: how long `get` and `wait` may wait for a key, and how long the store itself is waited for here.

    Raises:
        torch.distributed.DistNetworkError: it is not reached.
        BackendError: it has another secret, or another program listens there.
        ConfigError: the secret is too short.
    """

    def __init__(self, host: str, port: int, secret: bytes, timeout: timedelta) -> None:
        super().__init__()
        self.set_timeout(timeout)  # C++ keeps it, and groups and prefixes read it there
        self._connections = _Connections(host, port, secret)
        self._connections.open(timeout.total_seconds())
        _kept.append(self)

    @property
    def host(self) -> str:
        """IP address of the store."""
        return self._connections.host

    @property
    def port(self) -> int:
        """Its port."""
        return self._connections.port

    @property
    def timeout(self) -> timedelta:
        """How long `get` and `wait` may wait for a key; see `set_timeout`."""
        stated: timedelta = super().timeout  # type: ignore[misc]  # torch's stubs lack it
        return stated

    def clone(self) -> RunStore:
        """Another handle on the same keys, with a time-out of its own."""
        other = RunStore.__new__(RunStore)
        dist.Store.__init__(other)
        other.set_timeout(self.timeout)
        other._connections = self._connections
        _kept.append(other)
        return other

    def _ask(self, code: int, *fields: bytes | str, patience: float = 0.0) -> list[bytes]:
        return self._connections.ask(code, [_bytes(field) for field in fields], patience)

    def _wait(self, code: int, keys: Sequence[str], timeout: timedelta | None = None) -> list[bytes]:
        patience = (self.timeout if timeout is None else timeout).total_seconds()
        return self._ask(code, frames.seconds(patience), *keys, patience=patience)

    def set(self, key: str, value: bytes | str) -> None:
        """Set a key."""
        self._ask(frames.SET, key, value)

    def get(self, key: str) -> bytes:
        """A key's value, waiting for it."""
        return self._wait(frames.GET, [key])[0]

    def add(self, key: str, value: int) -> int:
        """Add to a counter; its new value."""
        return int(self._ask(frames.ADD, key, str(int(value)))[0])

    def compare_set(self, key: str, expected: bytes | str, desired: bytes | str) -> bytes:
        """Set a key if it has the expected value; its value afterwards."""
        return self._ask(frames.COMPARE_SET, key, expected, desired)[0]

    def check(self, keys: list[str]) -> bool:
        """Whether all keys exist."""
        return self._ask(frames.CHECK, *keys)[0] == b"1"

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Until all keys exist."""
        self._wait(frames.WAIT, keys, timeout)

    def delete_key(self, key: str) -> bool:
        """Delete a key; whether it was there."""
        return self._ask(frames.DELETE, key)[0] == b"1"

    def num_keys(self) -> int:
        """How many keys there are."""
        return int(self._ask(frames.COUNT)[0])

    # As torch's C++ side calls them.
    deleteKey = delete_key
    getNumKeys = num_keys

    def has_extended_api(self) -> bool:
        """append, multi_get and multi_set exist."""
        return True

    def append(self, key: str, value: bytes | str) -> None:
        """Append to a key's value."""
        self._ask(frames.APPEND, key, value)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Several values, waiting for all."""
        return self._wait(frames.GET, keys)

    def multi_set(self, keys: list[str], values: list[bytes | str]) -> None:
        """Set several keys."""
        self._ask(frames.SET, *[part for pair in zip(keys, values, strict=True) for part in pair])
