"""The collectives, with torch.distributed's signatures, each recorded in the ledger.

Messages between two ranks and lists of tensors are in point_to_point.py and tensor_lists.py.
"""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.counted import Group, counted

# torch 2.13 gave these two a new name and deprecated the old one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@counted("all_reduce", "tensor")
def all_reduce(
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Reduce `tensor` over the group, in place."""
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def inference_all_reduce(
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """`all_reduce` under the name that tensor-parallel layers call; there is no faster path of its own."""
    return all_reduce(tensor, op, group, async_op, prof, log_name or "inference_all_reduce", debug)


@counted("reduce_scatter", "tensor")
def reduce_scatter_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Reduce `tensor` (n x output elements) and leave the r-th slice in `output_tensor` on rank r."""
    return _reduce_scatter(output_tensor, tensor, op=op, group=group, async_op=async_op)


@counted("all_gather", "output_tensor")
def all_gather_into_tensor(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Concatenate every rank's `tensor` in `output_tensor` (n x its elements)."""
    return _all_gather(output_tensor, tensor, group=group, async_op=async_op)


def reduce_scatter_fn(
    output_tensor: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    debug: str | None = None,
) -> Any:
    """DeepSpeed's other name of `reduce_scatter_tensor`."""
    return reduce_scatter_tensor(output_tensor, tensor, op, group, async_op, prof, None, debug)


def allgather_fn(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    debug: str | None = None,
) -> Any:
    """DeepSpeed's other name of `all_gather_into_tensor`."""
    return all_gather_into_tensor(output_tensor, input_tensor, group, async_op, debug=debug)


def _sent_in_pieces(
    tensor: torch.Tensor, input_split_sizes: list[int] | None, group: Group, **_: Any
) -> int | None:
    if input_split_sizes is None:
        return None
    row = tensor.nbytes // len(tensor) if len(tensor) else 0
    return tensor.nbytes - input_split_sizes[dist.get_rank(group)] * row


@counted("all_to_all", "tensor", sent=_sent_in_pieces)
def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Send the r-th slice of `tensor` to rank r; the slices are equal unless sizes are given."""
    return dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)


@counted("broadcast", "tensor")
def broadcast(
    tensor: torch.Tensor,
    src: int,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Copy `tensor` from global rank `src` to the whole group."""
    return dist.broadcast(tensor, src, group=group, async_op=async_op)


@counted("reduce", "tensor")
def reduce(
    tensor: torch.Tensor,
    dst: int,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Reduce `tensor` into global rank `dst`."""
    return dist.reduce(tensor, dst, op=op, group=group, async_op=async_op)


@counted("barrier", size=lambda **_: 0)
def barrier(
    group: Group = None,
    async_op: bool = False,
    device_ids: list[int] | None = None,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Wait for all ranks of the group."""
    return dist.barrier(group, async_op=async_op, device_ids=device_ids)


@counted("barrier", size=lambda **_: 0)
def monitored_barrier(
    group: Group = None,
    timeout: timedelta | None = None,
    wait_all_ranks: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> None:
    """A barrier that names the ranks that do not arrive in time.

    Raises:
        RuntimeError: ranks are missing, or the group's library has no such barrier (gloo has).
    """
    dist.monitored_barrier(group, timeout, wait_all_ranks)


def _pickled_by_all(obj: Any, group: Group, **_: Any) -> int:
    return len(pickle.dumps(obj)) * dist.get_world_size(group)


@counted("all_gather", _pickled_by_all, name="all_gather_object")
def all_gather_object(
    object_list: list[Any],
    obj: Any,
    group: Group = None,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> None:
    """Gather every rank's picklable object (counted as n times this rank's pickled size)."""
    dist.all_gather_object(object_list, obj, group=group)


def _pickled_at_source(object_list: list[Any], src: int, **_: Any) -> int:
    return len(pickle.dumps(object_list)) if dist.get_rank() == src else 0


@counted("broadcast", _pickled_at_source, name="broadcast_object_list")
def broadcast_object_list(
    object_list: list[Any],
    src: int,
    group: Group = None,
    device: torch.device | None = None,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> None:
    """Copy the list from global rank `src`. The pickled size is counted on the sender."""
    dist.broadcast_object_list(object_list, src, group=group, device=device)
