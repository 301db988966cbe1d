"""Reading a torch file without executing code from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

_NUMPY_DTYPES = [
    type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.uint8, np.bool_)
]
_HARMLESS = [argparse.Namespace, np.ndarray, np.dtype, *_NUMPY_DTYPES]
"""Plain holders of values beyond torch's own list: Megatron keeps its `args`, many scripts numpy scalars."""


def _numpy_constructors() -> list[Any]:
    core = getattr(np, "_core", None) or np.core
    return [core.multiarray.scalar, core.multiarray._reconstruct]


def safe_load(path: Path) -> Any:
    """`torch.load` on the host for numbers, strings, containers, tensors, numpy values and Namespaces."""
    with torch.serialization.safe_globals([*_HARMLESS, *_numpy_constructors()]):
        return torch.load(path, map_location="cpu", weights_only=True)
