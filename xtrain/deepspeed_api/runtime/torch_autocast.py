"""`deepspeed.runtime.torch_autocast`: the dtype in which a parameter's gradient travels under autocast."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from xtrain.precision.autocast import COMM_DTYPE, SAFE_MODULES

LOWER_PRECISION_SAFE_MODULES = list(SAFE_MODULES)
PARAM_COMM_DTYPE_ATTR_NAME = COMM_DTYPE


def get_default_autocast_lower_precision_modules() -> list[str]:
    """Names of the classes whose gradients travel in the autocast dtype unless the config says otherwise."""
    return [f"{kind.__module__}.{kind.__name__}" for kind in SAFE_MODULES]


def has_comm_dtype(param: nn.Parameter) -> bool:
    """Whether its gradient travels in the autocast dtype."""
    return hasattr(param, COMM_DTYPE)


def get_comm_dtype(param: nn.Parameter) -> torch.dtype:
    """The dtype in which its gradient travels; its own where autocast does not concern it."""
    dtype: torch.dtype = getattr(param, COMM_DTYPE, param.dtype)
    return dtype


def get_all_comm_dtypes(params: Iterable[nn.Parameter]) -> set[torch.dtype]:
    """`get_comm_dtype` of each."""
    return {get_comm_dtype(param) for param in params}


def sort_dtypes(dtypes: Iterable[torch.dtype]) -> list[torch.dtype]:
    """By name."""
    return sorted(dtypes, key=str)


__all__ = [
    "LOWER_PRECISION_SAFE_MODULES",
    "PARAM_COMM_DTYPE_ATTR_NAME",
    "get_all_comm_dtypes",
    "get_comm_dtype",
    "get_default_autocast_lower_precision_modules",
    "has_comm_dtype",
    "sort_dtypes",
]
