"""`deepspeed.runtime.zero.partition_parameters`: divided parameters under DeepSpeed's names."""

from collections.abc import Callable
from typing import Any

import torch

from xtrain import comm
from xtrain.zero.gathered import (
    GatheredParameters,
    register_external_parameter,
    unregister_external_parameter,
)
from xtrain.zero.home import ZeroParamStatus, home_of
from xtrain.zero.init import Init

partitioned_param_data_shape = [0]
"""Shape of `param.data` while a parameter is divided."""

_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fn` itself: xtrain's `zero.Init` leaves torch.arange and its kin alone, and converts parameters only.

    Transformers replaces this function while it builds a model, to keep DeepSpeed from rounding the tables of
    rotary embeddings.
    """
    return fn


def is_zero_param(parameter: object) -> bool:
    """Whether a parameter is divided, by `zero.Init` or by an engine in stage 3."""
    return torch.is_tensor(parameter) and hasattr(parameter, "ds_id") and home_of(parameter) is not None


def print_rank_0(message: object, debug: bool = False, force: bool = False) -> None:
    """Print on rank 0 when `debug` or `force` says so."""
    if (debug or force) and comm.get_rank() == 0:
        print(message)


__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "is_zero_param",
    "partitioned_param_data_shape",
    "print_rank_0",
    "register_external_parameter",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]
