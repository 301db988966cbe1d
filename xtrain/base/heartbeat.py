"""A rank's sign of life: a small file in shared memory or on the node's disk, which whoever supervises the rank reads.

No message and no system call a beat. Imports no torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from xtrain.base.run_folder import HEARTBEAT_VARIABLE

_LAYOUT = struct.Struct("<qqqd")


@dataclass(frozen=True)
class Beat:
    """What a rank has said last.

    Attributes:
        pid: its process.
        step: optimizer steps that it has made; -1 before it has an engine.
        count: how often it has said anything.
        time: of the last time, in seconds since the epoch.
    """

    pid: int
    step: int
    count: int
    time: float


class Heart:
    """This rank's file; `beat` says that something has gone on."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _LAYOUT.size)
        self._step, self._count = -1, 0
        self.beat()

    def beat(self, step: int | None = None) -> None:
        """Training has gone on; to that optimizer step, where one is given."""
        self._step = self._step if step is None else step
        self._count += 1
        _LAYOUT.pack_into(self._map, 0, os.getpid(), self._step, self._count, time.time())


_heart: Heart | None = None


def start(rank: int) -> None:
    """Begin to beat if somebody supervises this rank (XTRAIN_HEARTBEAT names the folder)."""
    global _heart
    folder = os.environ.get(HEARTBEAT_VARIABLE)
    if folder and _heart is None:
        _heart = Heart(heart_file(Path(folder), rank))


def beat(step: int | None = None) -> None:
    """Say that this rank goes on; nothing happens where nobody supervises it."""
    if _heart is not None:
        _heart.beat(step)


def heart_file(folder: Path, rank: int) -> Path:
    """Where rank `rank` beats."""
    return folder / f"rank{rank}.beat"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """What rank `rank` has said last; None before it has said anything."""
    try:
        data = heart_file(folder, rank).read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != _LAYOUT.size:
        return None
    found = Beat(*_LAYOUT.unpack(data))
    return found if found.count else None
