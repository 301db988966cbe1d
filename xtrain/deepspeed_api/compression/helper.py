"""`deepspeed.compression.helper`: parts of a model by their dotted names."""

from functools import reduce
from typing import Any

from torch import nn


def recursive_getattr(model: nn.Module, module_name: str) -> Any:
    """The part of the model with this dotted name."""
    return reduce(getattr, module_name.split("."), model)


def recursive_setattr(model: nn.Module, module_name: str, module: Any) -> None:
    """Put another part there."""
    parent, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, parent) if parent else model, name, module)


__all__ = ["recursive_getattr", "recursive_setattr"]
