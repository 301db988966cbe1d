"""DeepSpeed's `deepspeed.runtime.utils`: what scripts import from it."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

import numpy as np
import torch

from xtrain import comm
from xtrain.accelerator import get_accelerator
from xtrain.base.errors import ConfigError
from xtrain.metrics.memory_usage import see_memory_usage
from xtrain.runtime.overflow import (
    CheckOverflow,
    count_used_parameters_in_backward,
    get_grad_norm,
    get_weight_norm,
    is_expert_parameter,
    is_model_parallel_parameter,
)
from xtrain.runtime.partitioned_tensor import PartitionedTensor
from xtrain.runtime.tensor_lists import (
    align_dense_tensors,
    all_gather_dp_groups,
    all_gather_into_tensor_dp_groups,
    clip_tensors_by_global_norm,
    get_global_norm_of_tensors,
)
from xtrain.utils.bwc import bwc_pipeline_parallel_world_size, bwc_tensor_model_parallel_rank


def set_random_seed(seed: int) -> None:
    """Seed the generators of Python, numpy, PyTorch and the device."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    get_accelerator().manual_seed_all(seed)


def noop_decorator(func: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself: a stand-in where a decorator is chosen at run time."""
    return func


def ensure_directory_exists(filename: str) -> None:
    """Make the folder that the file is to be written to."""
    os.makedirs(os.path.dirname(os.path.abspath(filename)), exist_ok=True)


def get_ma_status() -> int:
    """Bytes that rank 0 has allocated on its device; 0 on the other ranks."""
    if comm.is_initialized() and comm.get_rank() != 0:
        return 0
    return int(get_accelerator().memory_allocated())


def empty_cache() -> None:
    """Give cached memory of the device back, and restart its peak statistics."""
    get_accelerator().empty_cache()
    get_accelerator().reset_peak_memory_stats()


def call_to_str(base: str, *args: Any, **kwargs: Any) -> str:
    """How a call is written: `call_to_str("f", 1, a="b")` is `f(1, a='b')`."""
    shown = [repr(value) for value in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
    return f"{base}({', '.join(shown)})"


def get_only_unique_item(items: Iterable[Any]) -> Any:
    """The one value that all items have.

    Raises:
        ConfigError: there are none, or they differ.
    """
    found = set(items)
    if len(found) != 1:
        raise ConfigError(f"one value was expected for all, found {len(found)}: {sorted(map(repr, found))}")
    return found.pop()


def move_to_device(
    item: Any, device: torch.device | str, criterion_func: Callable[[Any], bool] | None = None
) -> Any:
    """A copy of nested lists, tuples and dictionaries whose tensors are on the device.

    Args:
        criterion_func: which leaves to move; None: the tensors.
    """
    wanted = torch.is_tensor if criterion_func is None else criterion_func
    if wanted(item):
        return item.to(device)
    if isinstance(item, (list, tuple)):
        return type(item)(move_to_device(value, device, criterion_func) for value in item)
    if isinstance(item, dict):
        return {key: move_to_device(value, device, criterion_func) for key, value in item.items()}
    return item


# ---------------------------------------------------------------- dividing lists


def prefix_sum_inc(weights: Sequence[float]) -> list[float]:
    """Running totals, each with its own weight in it."""
    totals: list[float] = []
    for weight in weights:
        totals.append(weight + (totals[-1] if totals else 0))
    return totals


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Bounds of `num_parts` runs of items whose lengths differ by one at most, the longer ones first.

    Returns:
        num_parts + 1 positions; part p is items [bounds[p], bounds[p + 1]).
    """
    length, longer = divmod(num_items, num_parts)
    return [part * length + min(part, longer) for part in range(num_parts + 1)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Bounds of `num_parts` runs of items, none of them empty, that weigh about the same; see `partition_uniform`.

    As in DeepSpeed, runs are added from the left, and each time the difference between the heaviest and the
    lightest so far is made as small as it can be; of equally good places for a bound the last is taken.
    """
    count = len(weights)
    if count <= num_parts:
        return partition_uniform(count, num_parts)
    totals = [0.0, *prefix_sum_inc([float(weight) for weight in weights])]
    # For the first `stop` items in so many runs: (heaviest, lightest, where the last run starts).
    best: dict[int, tuple[float, float, int]] = {0: (0.0, math.inf, 0)}
    starts: list[dict[int, int]] = []
    for runs in range(1, num_parts + 1):
        longer: dict[int, tuple[float, float, int]] = {}
        for stop in range(runs, count + 1):
            options = (
                (max(heavy, totals[stop] - totals[start]), min(light, totals[stop] - totals[start]), start)
                for start, (heavy, light, _) in best.items()
                if start < stop
            )
            longer[stop] = min(options, key=lambda option: (option[0] - option[1], -option[2]))
        starts.append({stop: option[2] for stop, option in longer.items()})
        best = longer
    bounds = [count]
    for start_of in reversed(starts):
        bounds.append(start_of[bounds[-1]])
    return bounds[::-1]


# ---------------------------------------------------------------- norms


def get_global_norm(norm_list: Iterable[float]) -> float:
    """2-norm of everything whose parts have these 2-norms."""
    return math.sqrt(sum(float(norm) ** 2 for norm in norm_list))


def _norm(grad: torch.Tensor, norm_type: float) -> torch.Tensor:
    # On the host torch adds in sequence: in float32 the norm of a large gradient would be off by up to a percent.
    if grad.device.type != "cpu":
        return torch.linalg.vector_norm(grad, norm_type)
    exact = torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64)
    return exact.to(torch.promote_types(grad.dtype, torch.float32))


def clip_grad_norm_(
    parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2, mpu: Any = None
) -> torch.Tensor:
    """Clip the gradients of ordinary parameters together, in place; their norm before that.

    What an engine trains is clipped by `gradient_clipping`: its gradients are not in the parameters.

    Args:
        mpu: with one, each rank of its model-parallel group has parameters of its own, and the norm is that of all.

    With experts among the parameters (`param.allreduce` is False) the ranks' norms differ; their mean is taken.
    """
    parameters = [parameters] if torch.is_tensor(parameters) else list(parameters)
    grads = [param.grad for param in parameters if param.grad is not None]
    norms = [_norm(grad, norm_type) for grad in grads] or [torch.zeros(())]
    total = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if mpu is not None:
        group = mpu.get_model_parallel_group()
        if math.isinf(norm_type):
            comm.all_reduce(total, comm.ReduceOp.MAX, group=group)
        else:
            total = total**norm_type
            comm.all_reduce(total, group=group)
            total = total ** (1.0 / norm_type)
    if any(map(is_expert_parameter, parameters)) and comm.is_initialized():
        # Ranks with other experts would clip by other factors, and what they have in common would drift apart.
        comm.all_reduce(total)
        total = total / comm.get_world_size()
    factor = (float(max_norm) / (total + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.detach().mul_(factor.to(grad.device))
    return total


class DummyOptim:
    """Holds parameters where an optimizer is expected and none is wanted: `param_groups` with one group."""

    def __init__(self, params: Iterable[torch.Tensor]) -> None:
        self.param_groups = [{"params": params}]


__all__ = [
    "CheckOverflow",
    "DummyOptim",
    "PartitionedTensor",
    "align_dense_tensors",
    "all_gather_dp_groups",
    "all_gather_into_tensor_dp_groups",
    "bwc_pipeline_parallel_world_size",
    "bwc_tensor_model_parallel_rank",
    "call_to_str",
    "clip_grad_norm_",
    "clip_tensors_by_global_norm",
    "count_used_parameters_in_backward",
    "empty_cache",
    "ensure_directory_exists",
    "get_global_norm",
    "get_global_norm_of_tensors",
    "get_grad_norm",
    "get_ma_status",
    "get_only_unique_item",
    "get_weight_norm",
    "inf",
    "is_model_parallel_parameter",
    "move_to_device",
    "noop_decorator",
    "partition_balanced",
    "partition_uniform",
    "prefix_sum_inc",
    "see_memory_usage",
    "set_random_seed",
]
