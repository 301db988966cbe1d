"""The file of a run record while it is written: whole lines or nothing, and a full disk does not end training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xtrain.base.log import logger

Line = dict[str, Any]


class RecordFile:
    """Appends lines to a record; begins with a header whenever it has been opened.

    A disk that is full, or gone, is reported once. Every later step tries again, and the header that goes before the
    first one that succeeds says which steps were lost.

    Args:
        path: the file; its folder is made.
        header: makes the header line; called with the step before the first one that follows.
    """

    def __init__(self, path: Path, header: Callable[[int], Line]) -> None:
        self.path = path
        self._header = header
        self._descriptor: int | None = None
        self._lost: tuple[int, int] | None = None  # the first and the last step that could not be written

    @property
    def needs_header(self) -> bool:
        """Whether the next lines come after a header, as those of a process that starts."""
        return self._descriptor is None

    def append(self, step: int, lines: Sequence[Line]) -> bool:
        """Write the lines of a step, all of them or none; returns whether it was possible."""
        size = None
        try:
            before = b""
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                before = self._cut_off()
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
                header = self._header(step - 1)
                if self._lost is not None:
                    header["lost_steps"] = list(self._lost)
                lines = [header, *lines]
            size = os.fstat(self._descriptor).st_size
            text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
            self._write(before + text.encode())
        except OSError as error:
            self._give_up(step, size, error)
            return False
        if self._lost is not None:
            logger.warning(
                "the run record %s is written again from step %d on: steps %d to %d are lost",
                self.path,
                step,
                *self._lost,
            )
            self._lost = None
        return True

    def _cut_off(self) -> bytes:
        """What ends a line that a crash has cut off, which must not swallow the header."""
        if not self.path.exists() or not self.path.stat().st_size:
            return b""
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return b"" if file.read(1) == b"\n" else b"\n"

    def _write(self, data: bytes) -> None:
        assert self._descriptor is not None
        while data:
            data = data[os.write(self._descriptor, data) :]

    def _give_up(self, step: int, size: int | None, error: OSError) -> None:
        """Take back what was written of the step, and close: whoever reads now finds whole lines."""
        if self._descriptor is not None:
            with suppress(OSError):  # a line that stays cut off is what the reader expects of a crash
                if size is not None:
                    os.ftruncate(self._descriptor, size)
            with suppress(OSError):  # the error is being reported already
                os.close(self._descriptor)
            self._descriptor = None
        if self._lost is None:
            logger.warning(
                "the run record %s cannot be written (%s): training goes on, but its losses from step %d on are not "
                "recorded until the file can be written again",
                self.path,
                error.strerror or error,
                step,
            )
        self._lost = (step if self._lost is None else self._lost[0], step)

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                os.close(descriptor)
            except OSError as error:  # some network file systems report a full disk here
                logger.warning(
                    "the run record %s may lack its last lines: %s", self.path, error.strerror or error
                )
