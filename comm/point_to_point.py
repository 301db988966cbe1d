"""Messages between two ranks, with torch.distributed's signatures, each recorded in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xtrain.comm.counted import Group, count, counted
from xtrain.comm.failures import explained
from xtrain.comm.timing import finish

_TAG = 0x78747261
"""Keeps the messages of `exchange` apart from the script's own."""


@explained
def exchange(
    received: list[torch.Tensor | None], sent: list[torch.Tensor | None], group: Group, channel: int = 0
) -> list[Any]:
    """Start sending `sent[p]` to rank p of the group and receiving `received[p]` from it. Callers count the bytes.

    Args:
        channel: messages of different channels never meet, whatever order the ranks send them in.
    """
    works = [
        dist.irecv(tensor, group=group, group_src=peer, tag=_TAG + channel)
        for peer, tensor in enumerate(received)
        if tensor is not None
    ]
    works += [
        dist.isend(tensor, group=group, group_dst=peer, tag=_TAG + channel)
        for peer, tensor in enumerate(sent)
        if tensor is not None
    ]
    return works


@counted("send", "tensor")
def send(
    tensor: torch.Tensor,
    dst: int,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> None:
    """Send `tensor` to global rank `dst`."""
    dist.send(tensor, dst, group, tag)


@counted("recv", "tensor")
def recv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> int:
    """Receive into `tensor`; returns the sender's rank."""
    return dist.recv(tensor, src, group, tag)


@counted("send", "tensor", name="isend")
def isend(
    tensor: torch.Tensor,
    dst: int,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Start sending `tensor` to global rank `dst`; returns what to wait for."""
    return dist.isend(tensor, dst, group, tag)


@counted("recv", "tensor", name="irecv")
def irecv(
    tensor: torch.Tensor,
    src: int | None = None,
    group: Group = None,
    tag: int = 0,
    prof: bool = False,
    log_name: str | None = None,
    debug: str | None = None,
) -> Any:
    """Start receiving into `tensor`; returns what to wait for."""
    return dist.irecv(tensor, src, group, tag)


@dataclass(frozen=True)
class P2POp:
    """One message of `batch_isend_irecv`: `op` is `isend` or `irecv`, this module's or torch's."""

    op: Callable[..., Any]
    tensor: torch.Tensor
    peer: int
    group: Group = None
    tag: int = 0


@explained
def batch_isend_irecv(
    p2p_op_list: list[P2POp], prof: bool = False, log_name: str | None = None, debug: str | None = None
) -> list[Any]:
    """Start many messages together; returns what to wait for. torch's own P2POp is taken too."""
    plain, clocks = [], []
    name = log_name or "batch_isend_irecv"
    for item in p2p_op_list:
        sends = item.op in (isend, dist.isend)
        operation = "send" if sends else "recv"
        clocks.append(count(operation, item.tensor.nbytes, item.group, None, prof, name, debug))
        op = dist.isend if sends else dist.irecv
        plain.append(dist.P2POp(op, item.tensor, item.peer, item.group, item.tag))
    works = dist.batch_isend_irecv(plain)
    # A library may answer with one object for all: then the first clock measures it.
    return [finish(clock, work) for clock, work in zip(clocks, works, strict=False)]
