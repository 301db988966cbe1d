"""What becomes of a use under xtrain, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from xtrain.migrate.use import Use


class Verdict(Enum):
    """From the best to the worst; the values are those of `--json` and `--verdict`."""

    AS_IS = "as_is"
    SHIM = "shim"
    CHANGE = "change"
    UNSUPPORTED = "unsupported"

    @property
    def title(self) -> str:
        """For people."""
        return {
            Verdict.AS_IS: "works as is",
            Verdict.SHIM: "works with `xtrain run`",
            Verdict.CHANGE: "needs a change",
            Verdict.UNSUPPORTED: "not supported",
        }[self]


Answer = tuple[Verdict, str]
"""The verdict, and why or what to do, as a sentence without a full stop; empty where there is nothing to say."""


@dataclass(frozen=True)
class Finding:
    """A use with its verdict."""

    use: Use
    verdict: Verdict
    text: str
