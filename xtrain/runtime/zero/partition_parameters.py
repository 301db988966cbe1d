"""`deepspeed.runtime.zero.partition_parameters`: divided parameters under DeepSpeed's names."""

from collections.abc import Callable
from typing import Any

import torch

from xtrain.zero.gathered import (
    GatheredParameters,
    register_external_parameter,
    unregister_external_parameter,
)
from xtrain.zero.home import ZeroParamStatus
from xtrain.zero.init import Init

_orig_torch_arange = torch.arange


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fn` itself: xtrain's `zero.Init` leaves torch.arange and its kin alone, and converts parameters only.

    Transformers replaces this function while it builds a model, to keep DeepSpeed from rounding the tables of
    rotary embeddings.
    """
    return fn


__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "register_external_parameter",
    "unregister_external_parameter",
    "zero_wrapper_for_fp_tensor_constructor",
]
