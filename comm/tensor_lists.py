"""Collectives over lists of tensors, one for each rank or one after the other, each recorded in the ledger."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.collectives import all_gather_into_tensor, all_reduce
from xtrain.comm.counted import Group, bytes_of, counted
from xtrain.comm.direct import is_direct
from xtrain.comm.failures import explained
from xtrain.comm.point_to_point import exchange


class _Together:
    """Several running collectives as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self._works:
            work.wait()


def _together(works: list[Any], async_op: bool) -> _Together | None:
    together = _Together(works)
    if async_op:
        return together
    together.wait()
    return None


@counted("all_gather", "tensor_list")
def all_gather(
    tensor_list: list[torch.Tensor],
    tensor: torch.Tensor,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Gather every rank's `tensor` into the list."""
    return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)


@counted("reduce_scatter", "input_list")
def reduce_scatter(
    output: torch.Tensor,
    input_list: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Reduce the r-th tensor of every rank's list into `output` of rank r."""
    return dist.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)


def _sent_to_others(input_tensor_list: list[torch.Tensor], group: Group, **_: Any) -> int:
    return bytes_of(input_tensor_list) - input_tensor_list[dist.get_rank(group)].nbytes


@counted("all_to_all", "input_tensor_list", sent=_sent_to_others)
def all_to_all(
    output_tensor_list: list[torch.Tensor],
    input_tensor_list: list[torch.Tensor],
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Send the r-th contiguous tensor of the list to rank r; sizes may differ."""
    if not is_direct(group):
        return dist.all_to_all(output_tensor_list, input_tensor_list, group, async_op)
    # gloo's own wants equal sizes.
    rank = dist.get_rank(group)
    output_tensor_list[rank].copy_(input_tensor_list[rank])
    received: list[torch.Tensor | None] = [*output_tensor_list]
    sending: list[torch.Tensor | None] = [*input_tensor_list]
    received[rank] = sending[rank] = None
    return _together(exchange(received, sending, group), async_op)


def _of_all_ranks(tensor: torch.Tensor, group: Group, **_: Any) -> int:
    return tensor.nbytes * dist.get_world_size(group)


def _sent_to_root(tensor: torch.Tensor, dst: int, **_: Any) -> int:
    return 0 if dist.get_rank() == dst else tensor.nbytes


@counted("gather", _of_all_ranks, sent=_sent_to_root)
def gather(
    tensor: torch.Tensor,
    gather_list: list[torch.Tensor] | None = None,
    dst: int = 0,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Bring every rank's `tensor` into the list on global rank `dst`; the other ranks give no list."""
    return dist.gather(tensor, gather_list, dst, group, async_op)


def _sent_by_root(tensor: torch.Tensor, src: int, group: Group, **_: Any) -> int:
    return tensor.nbytes * (dist.get_world_size(group) - 1) if dist.get_rank() == src else 0


@counted("scatter", _of_all_ranks, sent=_sent_by_root)
def scatter(
    tensor: torch.Tensor,
    scatter_list: list[torch.Tensor] | None = None,
    src: int = 0,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Fill `tensor` of rank r with the r-th tensor of the list on global rank `src`."""
    return dist.scatter(tensor, scatter_list, src, group, async_op)


@explained
def all_reduce_coalesced(
    tensors: list[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: Group = None,
    async_op: bool = False,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Reduce several tensors in place; all are on the way at once."""
    name = log_name or "all_reduce_coalesced"
    return _together([all_reduce(tensor, op, group, True, prof, name, debug) for tensor in tensors], async_op)


@explained
def all_gather_coalesced(
    output_tensors: list[torch.Tensor],
    input_tensors: list[torch.Tensor],
    group: Group = None,
    async_op: bool = False,
) -> Any:
    """`all_gather_into_tensor` of several tensors; all are on the way at once."""
    works = [
        all_gather_into_tensor(output, input_tensors[index], group, True)
        for index, output in enumerate(output_tensors)
    ]
    return _together(works, async_op)
