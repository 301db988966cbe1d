"""The keys of a run, and the thread that serves them: in the agent of the first node, or in the launcher.

Follows torch's HashStore in what each operation does. Knows nothing of ranks or groups.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from xtrain.comm.store import frames
from xtrain.comm.store.frames import Frame
from xtrain.comm.store.listener import Listener, read_frames

_NAMED = 4
"""Missing keys that a message lists at most."""


@dataclass(eq=False)
class _Waiting:
    """A request whose keys are not all there."""

    number: int
    code: int
    keys: Sequence[bytes]
    missing: set[bytes]
    writer: asyncio.StreamWriter
    timer: asyncio.TimerHandle | None = field(default=None, repr=False)


class Server(Listener):
    """Keeps the keys of one start of a run; a restart gets a new server, so keys need no number of the attempt."""

    def __init__(self, host: str, secret: bytes, port: int = 0) -> None:
        self._keys: dict[bytes, bytes] = {}
        self._waiting: defaultdict[bytes, set[_Waiting]] = defaultdict(set)
        super().__init__(host, secret, port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming = frames.Incoming()
        while True:
            for body in await read_frames(reader, incoming):
                if (answer := self._answer(frames.unpack(body), writer)) is not None:
                    writer.write(answer)
            await writer.drain()  # who does not read its answers is not read from either

    def _answer(self, frame: Frame, writer: asyncio.StreamWriter) -> bytes | None:
        """The answer; None where it has to wait."""
        number, code, fields = frame
        if code in (frames.GET, frames.WAIT):
            if not fields:
                raise frames.FrameError("a request that waits does not say for how long")
            patience, keys = frames.read_seconds(fields[0]), fields[1:]
            missing = {key for key in keys if key not in self._keys}
            if missing:
                self._park(_Waiting(number, code, keys, missing, writer), patience)
                return None
            return self._found(number, code, keys)
        try:
            return frames.pack(number, frames.DONE, self._do(code, fields))
        except ValueError as error:
            return frames.pack(number, frames.WRONG, [str(error).encode()])

    def _do(self, code: int, fields: Sequence[bytes]) -> list[bytes]:
        """An operation that does not wait; ValueError: it makes no sense, which is the asker's affair."""
        if code == frames.SET:
            self._set(list(zip(fields[::2], fields[1::2], strict=True)))
            return []
        if code == frames.CHECK:
            return [b"%d" % all(key in self._keys for key in fields)]
        if code == frames.COUNT:
            return [b"%d" % len(self._keys)]
        key, *rest = fields
        if code == frames.ADD:
            (amount,) = rest
            return self._set([(key, b"%d" % (int(self._keys.get(key, b"0")) + int(amount)))])
        if code == frames.COMPARE_SET:
            expected, desired = rest
            return self._compare_set(key, expected, desired)
        if code == frames.DELETE:
            return [b"%d" % (self._keys.pop(key, None) is not None)]
        if code == frames.APPEND:
            (value,) = rest
            self._set([(key, self._keys.get(key, b"") + value)])
            return []
        raise ValueError(f"there is no operation {code}")

    def _compare_set(self, key: bytes, expected: bytes, desired: bytes) -> list[bytes]:
        if key not in self._keys and expected:
            return [expected]  # as torch's stores do
        if self._keys.get(key, b"") == expected:
            self._set([(key, desired)])
        return [self._keys[key]]

    def _set(self, pairs: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
        """Set keys, answer those who waited for them; the values."""
        pairs = list(pairs)
        self._keys.update(pairs)
        for key, _ in pairs:
            for waiting in self._waiting.pop(key, ()):
                waiting.missing.discard(key)
                if not waiting.missing:
                    if waiting.timer is not None:
                        waiting.timer.cancel()
                    self._send(waiting, self._found(waiting.number, waiting.code, waiting.keys))
        return [value for _, value in pairs]

    def _found(self, number: int, code: int, keys: Sequence[bytes]) -> bytes:
        # A key that was there may have been deleted while another was waited for.
        values = [self._keys.get(key, b"") for key in keys] if code == frames.GET else []
        return frames.pack(number, frames.DONE, values)

    def _park(self, waiting: _Waiting, patience: float) -> None:
        for key in waiting.missing:
            self._waiting[key].add(waiting)
        waiting.timer = self._loop.call_later(max(0.0, patience), self._late, waiting, patience)

    def _late(self, waiting: _Waiting, patience: float) -> None:
        for key in waiting.missing:
            self._waiting[key].discard(waiting)
            if not self._waiting[key]:
                del self._waiting[key]
        absent = sorted(key.decode(errors="replace") for key in waiting.missing)
        more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
        told = f"wait timeout after {patience:g} s, keys: {', '.join(absent[:_NAMED])}{more}"
        self._send(waiting, frames.pack(waiting.number, frames.LATE, [told.encode()]))

    def _send(self, waiting: _Waiting, answer: bytes) -> None:
        if not waiting.writer.is_closing():  # else who waited has gone
            waiting.writer.write(answer)
