"""What xtrain raises when the user has to act: one sentence that says what, where and what to do.

Every class carries `exit_code`, the status that the command line ends with. Programming errors
inside xtrain are ordinary exceptions and keep their tracebacks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class XtrainError(Exception):
    """Base of all errors whose cause is outside xtrain: configuration, data, files, environment."""

    exit_code = 2


class ConfigError(XtrainError, ValueError, AssertionError):
    """A configuration value or an argument is wrong.

    An AssertionError too, because DeepSpeed checks with `assert`: `except AssertionError` in a script goes on working.
    """


class NotImplementedYetError(XtrainError, NotImplementedError):
    """A DeepSpeed feature that xtrain does not have yet; says what to use instead."""

    def __init__(self, feature: str, instead: str) -> None:
        super().__init__(f"{feature} is not there yet in xtrain: {instead}")
        self.feature, self.instead = feature, instead

    def __reduce__(self) -> tuple[Any, ...]:
        """An exception is unpickled by calling its class, by default with the message."""
        return type(self), (self.feature, self.instead), self.__dict__


class BackendError(XtrainError, RuntimeError):
    """A backend was asked for and cannot be used on this machine."""


class PeerLostError(BackendError):
    """An operation cannot finish because another rank has ended or does not take part: what it did is the cause."""


class DataError(XtrainError, ValueError):
    """Training data is missing, empty or unreadable."""


class TrainingError(XtrainError, RuntimeError):
    """The run itself went wrong (it diverged, say); configuration and machine are as they should be."""

    exit_code = 1


class CheckpointError(XtrainError, RuntimeError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class RecordError(XtrainError, ValueError):
    """A run record cannot be read or compared."""


class RunInterrupted(KeyboardInterrupt):
    """The run was asked to stop; the engine has saved a checkpoint at a step boundary.

    Derives from KeyboardInterrupt so that a script's `except Exception` does not swallow it.
    """


class RunSignalled(RunInterrupted, SystemExit):
    """A signal asked the run to stop, and the ranks have saved where they could.

    A SystemExit too: a script that does not catch it ends without a traceback, with the status `code`, which is 128 +
    the signal's number.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """An exception is unpickled by calling its class, by default with the message alone."""
        return type(self), (str(self), self.code), self.__dict__


def nearest(word: str, choices: Iterable[str], similarity: float = 0.6) -> str | None:
    """The choice most similar to `word`, or None when none is at least so similar (1: equal)."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=similarity)
    return found[0] if found else None


def unknown_name(kind: str, word: str, choices: Iterable[str]) -> str:
    """A sentence for a name that is not one of `choices`, with the nearest one offered first."""
    names = sorted(choices)
    close = nearest(word, names)
    hint = f"did you mean {close!r}? " if close else ""
    return f"unknown {kind} {word!r}: {hint}choose one of {', '.join(names)}"
