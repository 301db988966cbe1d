"""MPI as a process group of torch.distributed, on mpi4py: DDP, FSDP2, pipelining and the engine run on it.

This module starts it. It does not discover ranks under other launchers (comm/discovery.py) and moves host
memory only. mpi4py is imported when MPI is asked for and never before: importing it starts MPI.
"""

from __future__ import annotations

from datetime import timedelta
from importlib import metadata
from importlib.util import find_spec

import torch.distributed as dist

from xtrain.base.log import logger
from xtrain.comm.mpi.library import load
from xtrain.comm.timeouts import default_timeout

NAME = "mpi4py"
"""The backend's name in torch.distributed, whose own "mpi" is reserved for a torch that was built with MPI."""


STARTED_BY = "mpiexec"
"""What starts the ranks: without it every process is alone."""


def unavailable_reason() -> str | None:
    """One sentence saying why MPI cannot be used here, found out without starting it; None when it may work."""
    if find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install 'xtrain[mpi]', or mpi4py alone where there is an MPI"
    return None


def version() -> str:
    """Of mpi4py; the MPI library's own only MPI itself can tell."""
    return f"mpi4py {metadata.version('mpi4py')}"


def start(
    rank: int = -1,
    world_size: int = -1,
    timeout: timedelta | None = None,
    init_method: str | None = None,
) -> None:
    """Start torch.distributed over the processes that mpiexec or srun has started.

    Ranks, sizes and the store come through MPI: no port is opened, MASTER_ADDR is not read. RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE are set in the environment where the launcher has not set them.

    Args:
        rank, world_size: what the caller expects, -1 for whatever MPI says; RANK and WORLD_SIZE of the
            environment count as expectations too. Ranks may be ordered differently from MPI's own.
        timeout: how long an operation may wait for the other ranks; None: `default_timeout`.
        init_method: the address of a rendezvous, which MPI does not need: a warning says that it is not used.

    Raises:
        BackendError: mpi4py or the MPI library is missing; MPI has another number of processes than expected.
    """
    timeout = default_timeout() if timeout is None else timeout
    load(timeout)
    if init_method not in (None, "env://", "mpi://"):
        logger.warning("init_method %r is not used: ranks meet through MPI", init_method)
    from xtrain.comm.mpi.group import create
    from xtrain.comm.mpi.world import join

    world = join(rank, world_size, timeout)
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu"])
    dist.init_process_group(
        NAME, store=world.new_store(timeout), rank=world.rank, world_size=world.size, timeout=timeout
    )
