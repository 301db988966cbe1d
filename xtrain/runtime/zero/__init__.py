"""`deepspeed.runtime.zero`: whatever xtrain.zero offers."""

from typing import Any

from xtrain import zero


def __getattr__(name: str) -> Any:
    return getattr(zero, name)
