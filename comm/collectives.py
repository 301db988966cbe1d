"""The collectives, with torch.distributed's signatures, each recorded in the ledger.

As in DeepSpeed, `prof` times a call while the communication log is on but not for every operation, and
`log_name` is the name it is summed up under.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.ledger import ledger
from xtrain.comm.timing import Running, comms_logger, finish

# torch 2.13 gave these two a new name and deprecated the old one.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Group = dist.ProcessGroup | None


def count(
    operation: str,
    message_bytes: int,
    group: Group,
    sent_bytes: int | None = None,
    prof: bool = False,
    log_name: str | None = None,
) -> Running | None:
    """Record one call in the ledger, and start its clock if it is to be timed.

    Args:
        sent_bytes: by this rank, where it does not follow from the operation.
    """
    name, ranks = "world" if group is None else group.group_name, dist.get_world_size(group)
    ledger.record(operation, name, ranks, message_bytes, sent_bytes)
    if not comms_logger.enabled:
        return None
    return comms_logger.begin(operation, message_bytes, ranks, log_name, prof)


def all_reduce(
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
) -> Any:
    """Reduce `tensor` over the group, in place."""
    clock = count("all_reduce", tensor.nbytes, group, None, prof, log_name)
    return finish(clock, dist.all_reduce(tensor, op=op, group=group, async_op=async_op))


def reduce_scatter_tensor(
    output: torch.Tensor,
    tensor: torch.Tensor,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
) -> Any:
    """Reduce `tensor` (n x output elements) and leave the r-th slice in `output` on rank r."""
    clock = count("reduce_scatter", tensor.nbytes, group, None, prof, log_name)
    return finish(clock, _reduce_scatter(output, tensor, op=op, group=group, async_op=async_op))


def all_gather_into_tensor(
    output_tensor: torch.Tensor,
    input_tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
) -> Any:
    """Concatenate every rank's `input_tensor` in `output_tensor` (n x input elements)."""
    clock = count("all_gather", output_tensor.nbytes, group, None, prof, log_name)
    return finish(clock, _all_gather(output_tensor, input_tensor, group=group, async_op=async_op))


def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
) -> Any:
    """Gather every rank's `tensor` into the list."""
    clock = count("all_gather", sum(item.nbytes for item in tensor_list), group, None, prof, log_name)
    return finish(clock, dist.all_gather(tensor_list, tensor, group=group, async_op=async_op))


def all_to_all_single(
    output: torch.Tensor,
    tensor: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
) -> Any:
    """Send the r-th slice of `tensor` to rank r; the slices are equal unless sizes are given."""
    sent = None
    if input_split_sizes is not None:
        row = tensor.nbytes // len(tensor) if len(tensor) else 0
        sent = tensor.nbytes - input_split_sizes[dist.get_rank(group)] * row
    clock = count("all_to_all", tensor.nbytes, group, sent, prof, log_name)
    return finish(
        clock, dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)
    )


def broadcast(
    tensor: torch.Tensor,
    src: int,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
) -> Any:
    """Copy `tensor` from global rank `src` to the whole group."""
    clock = count("broadcast", tensor.nbytes, group, None, prof, log_name)
    return finish(clock, dist.broadcast(tensor, src, group=group, async_op=async_op))


def reduce(
    tensor: torch.Tensor,
    dst: int,
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
) -> Any:
    """Reduce `tensor` into global rank `dst`."""
    clock = count("reduce", tensor.nbytes, group, None, prof, log_name)
    return finish(clock, dist.reduce(tensor, dst, op=op, group=group, async_op=async_op))


def send(
    tensor: torch.Tensor,
    dst: int,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str | None = None,
) -> None:
    """Send `tensor` to global rank `dst`."""
    clock = count("send", tensor.nbytes, group, None, prof, log_name)
    dist.send(tensor, dst, group, tag)
    finish(clock, None)


def recv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str | None = None,
) -> int:
    """Receive into `tensor`; returns the sender's rank."""
    clock = count("recv", tensor.nbytes, group, None, prof, log_name)
    sender: int = finish(clock, dist.recv(tensor, src, group, tag))
    return sender


def barrier(
    group: Group = None, async_op: bool = False, prof: bool = False, log_name: str | None = None
) -> Any:
    """Wait for all ranks of the group."""
    clock = count("barrier", 0, group, None, prof, log_name)
    return finish(clock, dist.barrier(group, async_op=async_op))


def all_gather_object(object_list: list[Any], obj: Any, group: Group = None) -> None:
    """Gather every rank's picklable object (counted as n times this rank's pickled size)."""
    size = len(pickle.dumps(obj)) * dist.get_world_size(group)
    clock = count("all_gather", size, group, log_name="all_gather_object")
    dist.all_gather_object(object_list, obj, group=group)
    finish(clock, None)


def broadcast_object_list(object_list: list[Any], src: int, group: Group = None) -> None:
    """Copy the list from global rank `src`. The pickled size is counted on the sender."""
    size = len(pickle.dumps(object_list)) if dist.get_rank() == src else 0
    clock = count("broadcast", size, group, log_name="broadcast_object_list")
    dist.broadcast_object_list(object_list, src, group=group)
    finish(clock, None)
