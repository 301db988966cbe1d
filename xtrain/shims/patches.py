"""Attributes of other people's modules and classes that are replaced, and put back."""

from __future__ import annotations

import sys
from typing import Any

_ABSENT = object()
_ITS_OWN = ("torch", "xtrain")


def asked_by_torch(depth: int = 2) -> bool:
    """Whether the caller's caller is code of torch or xtrain itself, which must be told what is really there.

    Args:
        depth: frames between the code that asks and this function.
    """
    frame = sys._getframe(depth)
    return frame.f_globals.get("__name__", "").partition(".")[0] in _ITS_OWN


class Patches:
    """Replaced attributes, in the order in which they were replaced."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace `owner.name`; a class gets one of its own where it had its base's."""
        self._done.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back."""
        while self._done:
            owner, name, old = self._done.pop()
            if old is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
