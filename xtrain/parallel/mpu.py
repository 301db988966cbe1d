"""A script's `mpu`: the object that says who is in which process group, and what its methods have been called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xtrain.base.errors import ConfigError

_NAMES = {
    "tensor": ("tensor_model_parallel", "slice_parallel", "model_parallel"),
    "tensor alone": ("tensor_model_parallel", "slice_parallel"),
    "pipeline": ("pipeline_model_parallel", "pipe_parallel"),
    "model": ("model_parallel",),
    "data": ("data_parallel",),
    "sequence": ("sequence_parallel",),
    "sequence-data": ("sequence_data_parallel",),
}
"""Megatron's names for one dimension, newest first, and DeepSpeed's."""


class Answers:
    """What an mpu says, under whichever of the names it has; `what` is "world_size", "rank" or "group"."""

    def __init__(self, mpu: Any) -> None:
        self._mpu = mpu

    def _method(self, kind: str, what: str) -> Callable[[], Any] | None:
        for name in _NAMES[kind]:
            method = getattr(self._mpu, f"get_{name}_{what}", None)
            if callable(method):
                return method
        return None

    def has(self, kind: str, what: str) -> bool:
        """Whether it has an answer."""
        return self._method(kind, what) is not None

    def ask(self, kind: str, what: str, purpose: str) -> Any:
        """Its answer.

        Raises:
            ConfigError: it has none; `purpose` is what xtrain needs it for.
        """
        method = self._method(kind, what)
        if method is None:
            names = " or ".join(f"get_{name}_{what}()" for name in _NAMES[kind])
            raise ConfigError(f"the mpu object has no method {names}: xtrain needs it to find {purpose}")
        return method()

    def size(self, kind: str) -> int:
        """Size of a dimension that an mpu need not have."""
        method = self._method(kind, "world_size")
        return 1 if method is None else int(method())


_current: Any = None


def remember(mpu: Any) -> None:
    """Let `current` be this one; the engine calls it."""
    global _current
    _current = mpu


def current() -> Any:
    """The mpu of the engine that was built last; None without one."""
    return _current
