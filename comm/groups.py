"""Starting and ending the process groups, and asking who is in them."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xtrain.backends import registry
from xtrain.comm import mpi
from xtrain.errors import BackendError, ConfigError, NotImplementedYetError
from xtrain.log import log_dist

TORCH_DISTRIBUTED_DEFAULT_PORT = 29500
DEFAULT_TIMEOUT = timedelta(minutes=30)

_FOREIGN_LAUNCHERS = {
    # variable that holds the number of ranks: who sets it
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "mpiexec",
    "SLURM_NTASKS": "srun",
}

_SETTLE_SECONDS = 0.1

_companions: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()

is_available = dist.is_available
is_initialized = dist.is_initialized
new_group = dist.new_group
get_global_rank = dist.get_global_rank


def get_rank(group: dist.ProcessGroup | None = None) -> int:
    """Number of this process in the group; 0 without a process group."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def get_world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of processes in the group; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def get_local_rank() -> int:
    """Number of this process on its host, from the launcher's LOCAL_RANK."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def get_world_group() -> dist.ProcessGroup | None:
    """The group of all ranks; None before it exists."""
    return dist.group.WORLD


def companion(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """A second process group of the same ranks, for collectives whose order is independent of the first's.

    Collective over the group when it is made, which is once.
    """
    if get_world_size(group) == 1:
        return group
    parent = group or dist.group.WORLD
    assert parent is not None
    if parent not in _companions:
        ranks = None if group is None else dist.get_process_group_ranks(group)
        _companions[parent] = dist.new_group(ranks, use_local_synchronization=group is not None)
    return _companions[parent]


def _environment_rank(rank: int, world_size: int) -> tuple[int, int] | None:
    """(rank, world size) from the arguments or the launcher's environment; None for a lone process."""
    if rank >= 0 and world_size > 0:
        return rank, world_size
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for variable, launcher in _FOREIGN_LAUNCHERS.items():
        if int(os.environ.get(variable, "1")) > 1:
            raise NotImplementedYetError(
                f"discovery of ranks under {launcher} ({variable} is set)",
                "start with `xtrain launch` or torchrun, which set RANK and WORLD_SIZE",
            )
    return None


def init_distributed(
    dist_backend: str | None = None,
    auto_mpi_discovery: bool = True,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    verbose: bool = True,
    timeout: timedelta = DEFAULT_TIMEOUT,
    init_method: str | None = None,
    dist_init_required: bool | None = None,
    config: Any = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start torch.distributed unless it is running, with `deepspeed.init_distributed`'s signature.

    Args:
        dist_backend: process-group library; None takes the one of the detected backend. "mpi" is comm/mpi, where
            the ranks are MPI's.
        auto_mpi_discovery: accepted for compatibility; ranks come from the launcher's environment.
        distributed_port: port of rank 0 when the environment has no MASTER_PORT.
        timeout: how long a collective may wait for the other ranks.
        init_method: as in torch.distributed; None means `env://`, or no network for a lone process.
        dist_init_required: False asserts that the process group exists already.
        rank, world_size: override the environment when both are given.

    Raises:
        ConfigError: `dist_init_required` is False and no process group exists.
        BackendError: the process group cannot be made; says with which library, rank and address.
    """
    if dist.is_initialized():
        return
    if dist_init_required is False:
        raise ConfigError(
            "dist_init_required=False but torch.distributed is not initialized: call init_distributed() first"
        )
    library = dist_backend or registry.detect().collectives.process_group_backend
    over_mpi = library.lower() == "mpi"
    place = None if over_mpi else _environment_rank(rank, world_size)
    if over_mpi:
        mpi.start(rank, world_size, timeout, init_method)
    elif place is None:
        # A lone process: an in-memory store, so that no port is opened.
        dist.init_process_group(library, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(distributed_port))
        address = init_method or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            dist.init_process_group(
                library, init_method=init_method, rank=place[0], world_size=place[1], timeout=timeout
            )
        except (RuntimeError, ValueError, AssertionError) as error:
            raise BackendError(
                f"rank {place[0]} of {place[1]} could not start {library} at {address}: {error}"
            ) from error
    atexit.register(_settle)
    if verbose:
        log_dist(f"torch {torch.__version__} distributed: {library}, {get_world_size()} ranks", ranks=[0])


def _settle() -> None:
    """Give the library's threads a moment to let go of their last tensors before Python ends.

    A gloo thread that drops the last reference to a tensor needs the interpreter's lock. If it asks for
    it while the interpreter is shutting down, CPython ends that thread inside C++ code, which aborts the
    whole process (seen about once in forty two-rank runs on a busy machine, after a successful run).
    """
    time.sleep(_SETTLE_SECONDS)


def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
    """End the group (None: all groups) if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group(group)
