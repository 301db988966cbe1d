"""One module per accelerator. Nothing in here imports the engine."""

# First: under `xtrain run` the first import of torch asks for the backend, whose modules must not be half loaded then.
import torch  # noqa: F401

from xtrain.backends.backend import (
    Backend,
    CollectivesFacet,
    MemoryStatistics,
    PrecisionFacet,
    RuntimeFacet,
    ZeroFacet,
)
from xtrain.backends.device import DeviceRuntime
from xtrain.backends.emulating import EmulatingBackend
from xtrain.backends.registry import available, detect, get, names

__all__ = [
    "Backend",
    "CollectivesFacet",
    "DeviceRuntime",
    "EmulatingBackend",
    "MemoryStatistics",
    "PrecisionFacet",
    "RuntimeFacet",
    "ZeroFacet",
    "available",
    "detect",
    "get",
    "names",
]
