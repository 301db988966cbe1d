"""Collectives over lists of tensors, one for each rank or one after the other, each recorded in the ledger.

`prof`, `log_name` and `debug` as in collectives.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.collectives import Group, all_gather_into_tensor, all_reduce, count
from xtrain.comm.direct import is_direct
from xtrain.comm.failures import explained
from xtrain.comm.point_to_point import exchange
from xtrain.comm.timing import finish


class _Together:
    """Several running collectives as one."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self._works:
            work.wait()


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@explained
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
    clock = count("all_gather", _bytes(tensor_list), group, None, prof, log_name, debug)
    return finish(clock, dist.all_gather(tensor_list, tensor, group=group, async_op=async_op))


@explained
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
    clock = count("reduce_scatter", _bytes(input_list), group, None, prof, log_name, debug)
    return finish(clock, dist.reduce_scatter(output, input_list, op=op, group=group, async_op=async_op))


@explained
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
    size, rank = _bytes(input_tensor_list), dist.get_rank(group)
    sent = size - input_tensor_list[rank].nbytes
    clock = count("all_to_all", size, group, sent, prof, log_name, debug)
    if not is_direct(group):
        return finish(clock, dist.all_to_all(output_tensor_list, input_tensor_list, group, async_op))
    # gloo's own wants equal sizes.
    output_tensor_list[rank].copy_(input_tensor_list[rank])
    received: list[torch.Tensor | None] = [*output_tensor_list]
    sending: list[torch.Tensor | None] = [*input_tensor_list]
    received[rank] = sending[rank] = None
    together = _Together(exchange(received, sending, group))
    if not async_op:
        together.wait()
    return finish(clock, together if async_op else None)


@explained
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
    sent = 0 if dist.get_rank() == dst else tensor.nbytes
    size = tensor.nbytes * dist.get_world_size(group)
    clock = count("gather", size, group, sent, prof, log_name, debug)
    return finish(clock, dist.gather(tensor, gather_list, dst, group, async_op))


@explained
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
    others = dist.get_world_size(group) - 1
    sent = tensor.nbytes * others if dist.get_rank() == src else 0
    clock = count("scatter", tensor.nbytes * (others + 1), group, sent, prof, log_name, debug)
    return finish(clock, dist.scatter(tensor, scatter_list, src, group, async_op))


def _coalesced(start: Callable[[int], Any], count_: int, async_op: bool) -> _Together | None:
    together = _Together([start(index) for index in range(count_)])
    if async_op:
        return together
    together.wait()
    return None


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
    return _coalesced(
        lambda index: all_reduce(tensors[index], op, group, True, prof, name, debug), len(tensors), async_op
    )


@explained
def all_gather_coalesced(
    output_tensors: list[torch.Tensor],
    input_tensors: list[torch.Tensor],
    group: Group = None,
    async_op: bool = False,
) -> Any:
    """`all_gather_into_tensor` of several tensors; all are on the way at once."""
    return _coalesced(
        lambda index: all_gather_into_tensor(output_tensors[index], input_tensors[index], group, True),
        len(output_tensors),
        async_op,
    )
