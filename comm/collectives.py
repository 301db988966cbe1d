"""The collectives, with torch.distributed's signatures, each recorded in the ledger.

As in DeepSpeed, `prof` times a call while the communication log is on but not for every operation, and
`log_name` is the name it is summed up under; `debug` is the name of the caller, which the log shows in its debug
mode (None: it is found out). Messages between two ranks and lists of tensors are in point_to_point.py and
tensor_lists.py.
"""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.failures import explained
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
    debug: str | None = None,
) -> Running | None:
    """Record one call in the ledger, and start its clock if it is to be timed.

    Args:
        sent_bytes: by this rank, where it does not follow from the operation.
    """
    name, ranks = "world" if group is None else group.group_name, dist.get_world_size(group)
    ledger.record(operation, name, ranks, message_bytes, sent_bytes)
    if not comms_logger.enabled:
        return None
    return comms_logger.begin(operation, message_bytes, ranks, log_name, prof, debug)


@explained
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
    clock = count("all_reduce", tensor.nbytes, group, None, prof, log_name, debug)
    return finish(clock, dist.all_reduce(tensor, op=op, group=group, async_op=async_op))


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


@explained
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
    clock = count("reduce_scatter", tensor.nbytes, group, None, prof, log_name, debug)
    return finish(clock, _reduce_scatter(output_tensor, tensor, op=op, group=group, async_op=async_op))


@explained
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
    clock = count("all_gather", output_tensor.nbytes, group, None, prof, log_name, debug)
    return finish(clock, _all_gather(output_tensor, tensor, group=group, async_op=async_op))


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


@explained
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
    sent = None
    if input_split_sizes is not None:
        row = tensor.nbytes // len(tensor) if len(tensor) else 0
        sent = tensor.nbytes - input_split_sizes[dist.get_rank(group)] * row
    clock = count("all_to_all", tensor.nbytes, group, sent, prof, log_name, debug)
    return finish(
        clock, dist.all_to_all_single(output, tensor, output_split_sizes, input_split_sizes, group, async_op)
    )


@explained
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
    clock = count("broadcast", tensor.nbytes, group, None, prof, log_name, debug)
    return finish(clock, dist.broadcast(tensor, src, group=group, async_op=async_op))


@explained
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
    clock = count("reduce", tensor.nbytes, group, None, prof, log_name, debug)
    return finish(clock, dist.reduce(tensor, dst, op=op, group=group, async_op=async_op))


@explained
def barrier(
    group: Group = None,
    async_op: bool = False,
    device_ids: list[int] | None = None,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Wait for all ranks of the group."""
    clock = count("barrier", 0, group, None, prof, log_name, debug)
    return finish(clock, dist.barrier(group, async_op=async_op, device_ids=device_ids))


@explained
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
    clock = count("barrier", 0, group, None, prof, log_name, debug)
    dist.monitored_barrier(group, timeout, wait_all_ranks)
    finish(clock, None)


@explained
def all_gather_object(
    object_list: list[Any],
    obj: Any,
    group: Group = None,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> None:
    """Gather every rank's picklable object (counted as n times this rank's pickled size)."""
    size = len(pickle.dumps(obj)) * dist.get_world_size(group)
    clock = count("all_gather", size, group, None, prof, log_name or "all_gather_object", debug)
    dist.all_gather_object(object_list, obj, group=group)
    finish(clock, None)


@explained
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
    size = len(pickle.dumps(object_list)) if dist.get_rank() == src else 0
    clock = count("broadcast", size, group, None, prof, log_name or "broadcast_object_list", debug)
    dist.broadcast_object_list(object_list, src, group=group, device=device)
    finish(clock, None)
