"""A thread that listens on one address, lets in who knows the secret, and hands over each connection.

The part that `Server` and `Relay` share: no keys here. Who does not prove within seconds that it knows the secret is
dropped, and holds up nobody meanwhile.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import resource
import socket
import threading
from concurrent.futures import Future
from contextlib import suppress

from xtrain.base.errors import BackendError, ConfigError
from xtrain.base.log import logger
from xtrain.comm.store import frames

_PATIENCE = 5.0
"""Seconds in which a client has to prove itself."""
_BACKLOG = 4096
"""Connections that may wait to be accepted: ranks start at the same moment. Linux caps it at net.core.somaxconn."""
_FILES = 65536
_AT_ONCE = 1 << 18
"""Bytes that are read from one connection before it is others' turn."""
_LEAST_SECRET = 16
_BROKEN = (OSError, EOFError, frames.FrameError)
"""How a connection ends that its other side has left or uses wrongly."""

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def read_frames(reader: asyncio.StreamReader, incoming: frames.Incoming) -> list[bytes]:
    """The bodies that have come since; empty where only a part of one has.

    Raises:
        EOFError: the other side has closed the connection.
        FrameError: one is too large.
    """
    data = await reader.read(_AT_ONCE)
    if not data:
        raise EOFError("the other side has closed the connection")
    return incoming.feed(data)


def check_secret(secret: bytes) -> bytes:
    """The secret, if it is long enough not to be guessed.

    Raises:
        ConfigError: it is not.
    """
    if len(secret) < _LEAST_SECRET:
        raise ConfigError(
            f"the store's secret has {len(secret)} bytes: use at least {_LEAST_SECRET} random ones (os.urandom)"
        )
    return secret


def _bound(host: str, port: int) -> socket.socket:
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise ConfigError(f"the store listens on an IP address, not on {host!r}: resolve the name") from error
    if address.is_unspecified:
        raise ConfigError(f"the store listens on one address, and {host} means all: choose one of this host")
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except OSError as error:
        listening.close()
        raise BackendError(f"the store cannot listen at {host}:{port}: {error.strerror or error}") from error
    return listening


def _allow_files() -> None:
    """A host of 1,024 others needs more open files than the usual soft limit; what this process starts inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Listener:
    """Listens from the moment it is made until `close`.

    Args:
        host: IP address to listen on, this one and no other.
        secret: of the run, at least 16 bytes.
        port: 0 takes a free one; see `address`.

    Raises:
        ConfigError: `host` is no single IP address, or the secret is too short.
        BackendError: the address is not this host's, or the port is taken.
    """

    def __init__(self, host: str, secret: bytes, port: int = 0) -> None:
        self._secret = check_secret(secret)
        self._socket = _bound(host, port)
        self._address: tuple[str, int] = self._socket.getsockname()[:2]
        self._connections: set[asyncio.Task[None]] = set()
        _allow_files()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, name=f"xtrain-store-{type(self).__name__.lower()}", daemon=True
        )
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._thread.join()
            raise

    @property
    def address(self) -> tuple[str, int]:
        """IP address and port."""
        return self._address

    def close(self) -> None:
        """Stop listening and close all connections. Whoever waits on one of them gets an error."""
        if self._thread.is_alive():
            with suppress(RuntimeError):  # the loop has ended by itself at this moment
                self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._listen())
        except BaseException as error:
            if self._started.done():
                logger.exception("the run's store at %s:%s has stopped", *self._address)
            else:
                self._started.set_exception(error)
        finally:
            self._socket.close()
            self._loop.close()

    async def _listen(self) -> None:
        server = None
        try:
            await self._begin()
            server = await asyncio.start_server(self._connected, sock=self._socket, backlog=_BACKLOG)
            self._started.set_result(None)
            await self._stopping.wait()
        finally:
            if server is not None:
                server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            self._end()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await asyncio.wait_for(self._let_in(reader, writer), _PATIENCE)
            await self._serve(reader, writer)
        except (*_BROKEN, asyncio.TimeoutError) as error:
            logger.debug("a connection to the run's store ended: %r", error)
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise  # else by `_listen`, and asyncio would log that as an error
        finally:
            self._connections.discard(task)
            writer.close()

    async def _let_in(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = frames.hello()
        writer.write(hello)
        answer = await reader.readexactly(frames.NONCE + frames.PROOF)
        theirs, proof = answer[: frames.NONCE], answer[frames.NONCE :]
        ours = hello[len(frames.MAGIC) :]
        if not frames.same(proof, frames.proof(self._secret, b"client", ours, theirs)):
            raise frames.FrameError("the client does not know the secret")
        writer.write(frames.proof(self._secret, b"server", ours, theirs))

    async def _begin(self) -> None:
        """Before anybody is let in."""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Everything that happens on one connection, after the proofs."""
        raise NotImplementedError

    def _end(self) -> None:
        """After the last connection."""


async def connect(host: str, port: int, secret: bytes) -> Streams:
    """A connection on which both sides have proved themselves.

    Raises:
        OSError, EOFError: nothing listens there, or it closes the connection.
        BackendError: what listens there does not know the secret.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        hello = await reader.readexactly(frames.HELLO)
        theirs, ours = hello[len(frames.MAGIC) :], os.urandom(frames.NONCE)
        if hello[: len(frames.MAGIC)] != frames.MAGIC:
            raise BackendError(f"another program than the run's store listens at {host}:{port}")
        writer.write(ours + frames.proof(secret, b"client", theirs, ours))
        proof = await reader.readexactly(frames.PROOF)
        if not frames.same(proof, frames.proof(secret, b"server", theirs, ours)):
            raise BackendError(f"what listens at {host}:{port} does not know the secret of this run's store")
    except BaseException:
        writer.close()
        raise
    return reader, writer
