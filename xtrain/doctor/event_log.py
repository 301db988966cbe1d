"""What a process of the doctor's is doing and has found, a line of JSON each, for the one that watches it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Diary:
    """Written by one process; every line is in the file when the call returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, **values: Any) -> None:
        """Add a line."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say what is begun, which is what a process that does not come back was doing."""
        self.write("begin", what=what)
        yield
        self.write("end", what=what)


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines so far; none when the file is not there yet."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def has_started(lines: list[dict[str, Any]]) -> bool:
    """Whether its writer has imported what it needs and begun something."""
    return any(line["kind"] == "begin" for line in lines)


def doing(lines: list[dict[str, Any]]) -> str:
    """What its writer was doing last."""
    for line in reversed(lines):
        if line["kind"] == "begin":
            return str(line["what"])
        if line["kind"] == "end":
            return f"what follows {line['what']}"
    return "starting Python" if not lines else "importing torch and xtrain"
