"""`deepspeed.runtime.zero.partition_parameters`: divided parameters under DeepSpeed's names."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from xtrain import comm
from xtrain.base.stand_ins import refused_class
from xtrain.zero.gathered import (
    GatheredParameters,
    register_external_parameter,
    unregister_external_parameter,
)
from xtrain.zero.home import ZeroParamStatus, home_of
from xtrain.zero.init import Init, single_rank_contradiction
from xtrain.zero.linear import zero3_linear_wrap

partitioned_param_data_shape = [0]
"""Shape of `param.data` while a parameter is divided."""

# torch's own: nothing is put in their place here, so that these are what torch.empty and the others are.
_orig_torch_tensor = torch.tensor
_orig_torch_empty = torch.empty
_orig_torch_zeros = torch.zeros
_orig_torch_ones = torch.ones
_orig_torch_full = torch.full
_orig_torch_arange = torch.arange
_orig_torch_eye = torch.eye
_orig_torch_randn = torch.randn

_HERE = "runtime.zero.partition_parameters"
CUDAQuantizer = refused_class(f"{_HERE}.CUDAQuantizer")
InsertPostInitMethodToModuleSubClasses = refused_class(f"{_HERE}.InsertPostInitMethodToModuleSubClasses")
AllGatherHandle = refused_class(f"{_HERE}.AllGatherHandle")
AllGatherCoalescedHandle = refused_class(f"{_HERE}.AllGatherCoalescedHandle")


def zero_wrapper_for_fp_tensor_constructor(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`fn` itself: xtrain's `zero.Init` leaves torch.arange and its kin alone, and converts parameters only.

    Transformers replaces this function while it builds a model, to keep DeepSpeed from rounding the tables of
    rotary embeddings.
    """
    return fn


def is_zero_param(parameter: object) -> bool:
    """Whether a parameter is divided, by `zero.Init` or by an engine in stage 3."""
    return torch.is_tensor(parameter) and hasattr(parameter, "ds_id") and home_of(parameter) is not None


def get_allgather_dtype(param: torch.nn.Parameter, param_ds_tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a parameter's parts are gathered: their own, under autocast, too."""
    return param_ds_tensor.dtype


def _contradicting_single_rank_pg_error(
    dp_world_size: int, explicit_process_group: Any, env: Mapping[str, str | None] | None = None
) -> str | None:
    return single_rank_contradiction(dp_world_size, explicit_process_group, env)


class MultipleAllGatherHandles:
    """Several handles as one.

    Args:
        handles: each has a `wait`.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self.handles = handles

    def wait(self, **kwargs: Any) -> None:
        """Wait for each, with the same arguments."""
        for handle in self.handles:
            handle.wait(**kwargs)


def print_rank_0(message: object, debug: bool = False, force: bool = False) -> None:
    """Print on rank 0 when `debug` or `force` says so."""
    if (debug or force) and comm.get_rank() == 0:
        print(message)


__all__ = [
    "AllGatherCoalescedHandle",
    "AllGatherHandle",
    "CUDAQuantizer",
    "GatheredParameters",
    "Init",
    "InsertPostInitMethodToModuleSubClasses",
    "MultipleAllGatherHandles",
    "ZeroParamStatus",
    "get_allgather_dtype",
    "is_zero_param",
    "partitioned_param_data_shape",
    "print_rank_0",
    "register_external_parameter",
    "unregister_external_parameter",
    "zero3_linear_wrap",
    "zero_wrapper_for_fp_tensor_constructor",
]
