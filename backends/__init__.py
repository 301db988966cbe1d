"""One module per accelerator. Nothing in here imports the engine."""

from xtrain.backends.base import Backend
from xtrain.backends.registry import available, detect, get, names

__all__ = ["Backend", "available", "detect", "get", "names"]
