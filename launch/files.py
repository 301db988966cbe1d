"""Reading files that others append to."""

from __future__ import annotations

from pathlib import Path


def text_since(path: Path, offset: int) -> str:
    """What a file has got since `offset`, whatever bytes they are; nothing when there is no file."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read().decode(errors="replace")


def lines_since(path: Path, offset: int) -> list[str]:
    """Its lines that say something."""
    return [line for line in text_since(path, offset).splitlines() if line.strip()]


def new_text(path: Path, offset: int) -> tuple[str, int]:
    """What a file has got since `offset`, whole lines only, and the new offset."""
    if not path.exists():
        return "", offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode("utf-8"), offset + len(whole)
