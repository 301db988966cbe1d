"""What goes over a connection of the run's store: who one is, then requests and answers as length-prefixed bytes.

Nothing is ever unpickled. No sockets here, and no keys.

A connection begins with a mutual proof that both sides know the run's secret, which itself does not travel:

    server → client    MAGIC, 32 random bytes a
    client → server    32 random bytes b, HMAC-SHA256(secret, "client" a b)
    server → client    HMAC-SHA256(secret, "server" a b)

After it, both sides send frames: a length of 4 bytes, then a number of 4 bytes that says which request is answered, a
code of 1 byte (an operation, or how it went), and fields, each with a length of 4 bytes. Numbers are big-endian.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Sequence

MAGIC = b"xtrain1\n"
NONCE = 32
PROOF = 32
HELLO = len(MAGIC) + NONCE
LARGEST = 256 << 20
"""Bytes of the largest frame of a side that has proved itself. Before that, nothing is read but fixed lengths."""
LENGTH = struct.Struct("!I")
_HEAD = struct.Struct("!IB")
_SECONDS = struct.Struct("!d")

# operations: their fields → the fields of the answer
SET = 1
"""key, value, key, value, … →"""
GET = 2
"""seconds, key, … → value, …, when all are there"""
WAIT = 3
"""seconds, key, … → , when all are there"""
ADD = 4
"""key, number → new number"""
COMPARE_SET = 5
"""key, expected value, desired value → the value afterwards"""
CHECK = 6
"""key, … → 1 or 0"""
DELETE = 7
"""key → 1 or 0"""
COUNT = 8
"""→ number of keys"""
APPEND = 9
"""key, value →"""

# how it went
DONE = 100
LATE = 101
"""Keys that were waited for did not come: the message."""
WRONG = 102
"""The request makes no sense: the message."""

Frame = tuple[int, int, list[bytes]]
"""Number, code, fields."""


class FrameError(Exception):
    """The other side breaks the rules: the connection is closed."""


def hello() -> bytes:
    """How the side that was connected to begins."""
    return MAGIC + os.urandom(NONCE)


def proof(secret: bytes, role: bytes, theirs: bytes, ours: bytes) -> bytes:
    """That `role` (b"client" or b"server") knows the secret; nonces of the server and of the client."""
    return hmac.digest(secret, role + theirs + ours, "sha256")


def same(one: bytes, other: bytes) -> bool:
    """Whether two proofs are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(one, other)


def pack(number: int, code: int, fields: Sequence[bytes]) -> bytes:
    """A whole frame.

    Raises:
        FrameError: it is larger than LARGEST bytes.
    """
    parts = [_HEAD.pack(number, code)]
    for field in fields:
        parts += LENGTH.pack(len(field)), field
    body = b"".join(parts)
    if len(body) > LARGEST:
        raise FrameError(f"{len(body)} bytes at once are more than the {LARGEST} that the run's store takes")
    return LENGTH.pack(len(body)) + body


def renumbered(body: bytes, number: int) -> bytes:
    """The whole frame of a body, with another number."""
    return LENGTH.pack(len(body)) + LENGTH.pack(number) + body[LENGTH.size :]


def number_of(body: bytes) -> int:
    """The number of a frame's body.

    Raises:
        FrameError: it has none.
    """
    if len(body) < _HEAD.size:
        raise FrameError("a frame without a head")
    return int(LENGTH.unpack_from(body)[0])


def length(prefix: bytes | bytearray) -> int:
    """How many bytes follow.

    Raises:
        FrameError: more than LARGEST.
    """
    (size,) = LENGTH.unpack(prefix)
    if size > LARGEST:
        raise FrameError(f"a frame of {size} bytes is larger than {LARGEST}")
    return int(size)


def unpack(body: bytes) -> Frame:
    """Number, code and fields of a frame's body.

    Raises:
        FrameError: the lengths do not fit.
    """
    try:
        number, code = _HEAD.unpack_from(body)
        fields, at = [], _HEAD.size
        while at < len(body):
            (size,) = LENGTH.unpack_from(body, at)
            at += LENGTH.size + size
            if at > len(body):
                raise FrameError("a field reaches beyond its frame")
            fields.append(body[at - size : at])
    except struct.error as error:
        raise FrameError(f"a frame that cannot be read: {error}") from error
    return number, code, fields


class Incoming:
    """Cuts what arrives on a connection into the bodies of frames, many at a time where they come so."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are complete now.

        Raises:
            FrameError: one is larger than LARGEST.
        """
        self._rest += data
        bodies, at = [], 0
        while len(self._rest) - at >= LENGTH.size:
            begin = at + LENGTH.size
            end = begin + length(self._rest[at:begin])
            if end > len(self._rest):
                break
            bodies.append(bytes(self._rest[begin:end]))
            at = end
        del self._rest[:at]
        return bodies


def seconds(value: float) -> bytes:
    """A field with a time in seconds."""
    return _SECONDS.pack(value)


def read_seconds(field: bytes) -> float:
    """The time in such a field, in seconds.

    Raises:
        FrameError: it is none.
    """
    if len(field) != _SECONDS.size:
        raise FrameError("a request that waits does not say for how long")
    return float(_SECONDS.unpack(field)[0])
