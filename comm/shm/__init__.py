"""Shared memory between ranks of one host, as a process group of torch.distributed: the engine, DDP, FSDP2 run on it.

This module registers it. Ranks meet as they do for gloo, whose place it takes; across hosts gloo carries what has
been combined inside each (hosts.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

NAME = "shm"
"""The backend's name in torch.distributed."""


def register() -> None:
    """Make the name known to torch.distributed; may be repeated."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, _: Any) -> Any:
    from xtrain.comm.shm.rendezvous import create

    return create(options, _)


def zeros(elements: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A flat tensor of zeros that ranks of this host read where it is, when they exchange it.

    It belongs to this process as any other, and goes with its last reference. After a fork, parent and child share it.
    """
    from xtrain.comm.shm import arena

    return arena.own().zeros(elements, dtype)
