"""Doing something on every rank and failing on all of them if it fails on one, instead of hanging."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from xtrain import comm
from xtrain.base.errors import XtrainError


def together(action: Callable[[], Any], what: str, error: type[XtrainError]) -> list[Any]:
    """Run `action` on every rank; return every rank's result, which must be picklable.

    Args:
        action: must not contain collectives: a rank that fails would leave the others waiting.
        what: what was attempted, for the message.
        error: class of the error that all ranks raise when one of them failed.
    """
    result: tuple[Any, str | None]
    try:
        result = alone(action, what, error), None
    except XtrainError as problem:
        result = None, str(problem)
    try:
        pickle.dumps(result)
    except Exception as problem:
        result = None, f"{what} failed on rank {comm.get_rank()}: its result cannot be sent: {problem}"
    results: list[Any] = [None] * comm.get_world_size()
    comm.all_gather_object(results, result)
    for _, message in results:
        if message is not None:
            raise error(message)
    return [value for value, _ in results]


def alone(action: Callable[[], Any], what: str, error: type[XtrainError]) -> Any:
    """Run `action` on this rank, with the error that `together` would raise."""
    try:
        return action()
    except XtrainError as problem:
        if isinstance(problem, error):
            raise
        raise error(str(problem)) from problem
    except Exception as problem:  # whatever it was: in `together`, the other ranks must not wait
        raise error(
            f"{what} failed on rank {comm.get_rank()}: {type(problem).__name__}: {problem}"
        ) from problem
