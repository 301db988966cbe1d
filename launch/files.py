"""Reading files that others append to."""

from __future__ import annotations

from pathlib import Path


def new_text(path: Path, offset: int) -> tuple[str, int]:
    """What a file has got since `offset`, whole lines only, and the new offset."""
    if not path.exists():
        return "", offset
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    return whole.decode("utf-8"), offset + len(whole)
