"""Lists of tensors as one vector: part of `deepspeed.runtime.utils`. The engine uses none of this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from xtrain import comm


def align_dense_tensors(tensor_list: list[torch.Tensor], alignment: int) -> list[torch.Tensor]:
    """The tensors, and a tensor of zeros after them where their elements are no multiple of `alignment`."""
    missing = -sum(tensor.numel() for tensor in tensor_list) % alignment
    return [*tensor_list, tensor_list[0].new_zeros(missing)] if missing else tensor_list


def all_gather_into_tensor_dp_groups(
    groups_flat: Sequence[torch.Tensor],
    partitioned_param_groups: Sequence[Any],
    dp_process_group: Sequence[Any],
) -> None:
    """For each param group, gather the ranks' parts into its flat buffer.

    Args:
        groups_flat: flat buffers, one a param group.
        partitioned_param_groups: for each group, the views of its buffer that belong to the ranks, in order.
        dp_process_group: the process group of each.
    """
    for flat, parts, group in zip(groups_flat, partitioned_param_groups, dp_process_group, strict=True):
        if comm.get_world_size(group) > 1:
            comm.all_gather_into_tensor(flat, parts[comm.get_rank(group)].clone(), group=group)


def all_gather_dp_groups(
    groups_flat: Sequence[torch.Tensor],
    partitioned_param_groups: Sequence[Any],
    dp_process_group: Sequence[Any],
    start_alignment_factor: int,
    allgather_bucket_size: int,
) -> None:
    """`all_gather_into_tensor_dp_groups`; the sizes are about how it is cut, which changes no value."""
    all_gather_into_tensor_dp_groups(groups_flat, partitioned_param_groups, dp_process_group)


def get_global_norm_of_tensors(
    input_tensors: Sequence[torch.Tensor], norm_type: float = 2, mpu: Any = None, moe_ep_group: Any = None
) -> torch.Tensor:
    """The norm of all elements together, a float32 scalar; with an mpu, over its model-parallel ranks too."""
    each = torch.stack([tensor.detach().float().norm(norm_type) for tensor in input_tensors])
    largest = math.isinf(norm_type)
    total = each.max() if largest else each.pow(norm_type).sum()
    groups = [mpu.get_model_parallel_group()] if mpu is not None else []
    for group in [*groups, *([moe_ep_group] if moe_ep_group is not None else [])]:
        comm.all_reduce(total, comm.ReduceOp.MAX if largest else comm.ReduceOp.SUM, group=group)
    return total if largest else total.pow(1 / norm_type)


def clip_tensors_by_global_norm(
    input_tensors: Sequence[torch.Tensor],
    max_norm: float = 1.0,
    global_norm: Any = None,
    mpu: Any = None,
    eps: float = 1e-6,
) -> Any:
    """Scale the tensors in place so that their norm is at most `max_norm`; returns the norm they had."""
    norm = get_global_norm_of_tensors(input_tensors, mpu=mpu) if global_norm is None else global_norm
    factor = max_norm / (norm + eps)
    if factor < 1:
        for tensor in input_tensors:
            tensor.detach().mul_(factor)
    return norm
