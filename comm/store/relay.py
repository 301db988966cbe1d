"""The run's store on the other nodes: their ranks ask the relay on their own host, which asks the server.

One connection a node reaches the server, whatever the number of ranks. Requests are numbered, so that one that waits
holds up no other. A relay keeps no keys.
"""

from __future__ import annotations

import asyncio
import itertools

from xtrain.base.errors import BackendError
from xtrain.comm.store import frames
from xtrain.comm.store.listener import Listener, check_secret, connect, read_frames

_PATIENCE = 60.0
"""Seconds in which the server has to come: the first node's agent may start later than this one."""
_NAP = 0.1
_NUMBERS = 2**32


class Relay(Listener):
    """Forwards what its clients ask to a `Server` (or another relay).

    Args:
        upstream_host, upstream_port: where the server listens; looked for up to a minute.
        secret: of the run; clients prove that they know it here, too.
        listen: IP address that ranks connect to.

    Raises:
        BackendError: nothing answers there, or it does not know the secret, or this one's is wrong.
        ConfigError: see `Listener`.
    """

    def __init__(
        self, upstream_host: str, upstream_port: int, secret: bytes, listen: str = "127.0.0.1"
    ) -> None:
        self._upstream_host, self._upstream_port = upstream_host, upstream_port
        self._asked: dict[int, tuple[asyncio.StreamWriter, int]] = {}
        self._numbers = itertools.count()
        self._answers: asyncio.Task[None] | None = None
        super().__init__(listen, check_secret(secret))

    async def _begin(self) -> None:
        where = f"{self._upstream_host}:{self._upstream_port}"
        until = self._loop.time() + _PATIENCE
        while True:
            try:
                connecting = connect(self._upstream_host, self._upstream_port, self._secret)
                reader, self._upstream = await asyncio.wait_for(
                    connecting, max(_NAP, until - self._loop.time())
                )
                break
            except EOFError as error:
                raise BackendError(
                    f"the run's store at {where} refused this node: it has another secret, or is ending"
                ) from error
            except (OSError, asyncio.TimeoutError) as error:
                if self._loop.time() > until:
                    raise BackendError(
                        f"the run's store at {where} was not reached within {_PATIENCE:g} s: "
                        f"{error or 'no answer'}"
                    ) from error
            await asyncio.sleep(_NAP)
        self._answers = asyncio.create_task(self._hand_back(reader))

    async def _hand_back(self, reader: asyncio.StreamReader) -> None:
        """Give the server's answers to who asked, until the server goes: then this relay's clients have to know."""
        incoming = frames.Incoming()
        try:
            while True:
                for body in await read_frames(reader, incoming):
                    writer, number = self._asked.pop(frames.number_of(body), (None, 0))
                    if writer is not None and not writer.is_closing():
                        writer.write(frames.renumbered(body, number))
        except (OSError, EOFError, frames.FrameError):
            self._stopping.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        mine: set[int] = set()
        incoming = frames.Incoming()
        try:
            while True:
                for body in await read_frames(reader, incoming):
                    number = next(self._numbers) % _NUMBERS
                    self._asked[number] = writer, frames.number_of(body)
                    mine.add(number)
                    self._upstream.write(frames.renumbered(body, number))
                mine.intersection_update(self._asked)
                await self._upstream.drain()
        finally:
            for number in mine:
                self._asked.pop(number, None)

    def _end(self) -> None:
        if self._answers is not None:
            self._answers.cancel()
            self._upstream.close()
