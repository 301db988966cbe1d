"""The collectives, with torch.distributed's signatures, each recorded in the ledger."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.ledger import ledger

# torch 2.13 gave these two a new name and deprecated the old one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Group = dist.ProcessGroup | None


def count(operation: str, message_bytes: int, group: Group, sent_bytes: int | None = None) -> None:
    """Record one call in the ledger. `sent_bytes`: by this rank, where it does not follow from the operation."""
    name = "world" if group is None else group.group_name
    ledger.record(operation, name, dist.get_world_size(group), message_bytes, sent_bytes)


def all_reduce(
    tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Group = None, async_op: bool = False
) -> Any:
    """Reduce `tensor` over the group, in place."""
    count("all_reduce", tensor.nbytes, group)
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def reduce_scatter_tensor(
    output: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
) -> Any:
    """Reduce `tensor` (n x output elements) and leave the r-th slice in `output` on rank r."""
    count("reduce_scatter", tensor.nbytes, group)
    return _reduce_scatter(output, tensor, op=op, group=group, async_op=async_op)


def all_gather_into_tensor(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Group = None, async_op: bool = False
) -> Any:
    """Concatenate every rank's `input_tensor` in `output_tensor` (n x input elements)."""
    count("all_gather", output_tensor.nbytes, group)
    return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Group = None, async_op: bool = False
) -> Any:
    """Gather every rank's `tensor` into the list."""
    count("all_gather", sum(item.nbytes for item in tensor_list), group)
    return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)


def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
) -> Any:
    """Send the r-th slice of `tensor` to rank r; the slices are equal unless sizes are given."""
    if input_split_sizes is None:
        count("all_to_all", tensor.nbytes, group)
    else:
        row = tensor.nbytes // len(tensor) if len(tensor) else 0
        kept = input_split_sizes[dist.get_rank(group)] * row
        count("all_to_all", tensor.nbytes, group, tensor.nbytes - kept)
    return dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)


def broadcast(tensor: torch.Tensor, src: int, group: Group = None, async_op: bool = False) -> Any:
    """Copy `tensor` from global rank `src` to the whole group."""
    count("broadcast", tensor.nbytes, group)
    return dist.broadcast(tensor, src, group=group, async_op=async_op)


def reduce(
    tensor: torch.Tensor,
    dst: int,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
) -> Any:
    """Reduce `tensor` into global rank `dst`."""
    count("reduce", tensor.nbytes, group)
    return dist.reduce(tensor, dst, op=op, group=group, async_op=async_op)


def send(tensor: torch.Tensor, dst: int, group: Group = None, tag: int = 0) -> None:
    """Send `tensor` to global rank `dst`."""
    count("send", tensor.nbytes, group)
    dist.send(tensor, dst, group, tag)


def recv(tensor: torch.Tensor, src: int | None = None, group: Group = None, tag: int = 0) -> int:
    """Receive into `tensor`; returns the sender's rank."""
    count("recv", tensor.nbytes, group)
    return dist.recv(tensor, src, group, tag)


def barrier(group: Group = None, async_op: bool = False) -> Any:
    """Wait for all ranks of the group."""
    count("barrier", 0, group)
    return dist.barrier(group, async_op=async_op)


def all_gather_object(object_list: list[Any], obj: Any, group: Group = None) -> None:
    """Gather every rank's picklable object (counted as n times this rank's pickled size)."""
    count("all_gather", len(pickle.dumps(obj)) * dist.get_world_size(group), group)
    dist.all_gather_object(object_list, obj, group=group)


def broadcast_object_list(object_list: list[Any], src: int, group: Group = None) -> None:
    """Copy the list from global rank `src`. The pickled size is counted on the sender."""
    count("broadcast", len(pickle.dumps(object_list)) if dist.get_rank() == src else 0, group)
    dist.broadcast_object_list(object_list, src, group=group)
