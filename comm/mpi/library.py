"""Loading mpi4py and its MPI library, with a clear sentence where that fails. Nothing else."""

from __future__ import annotations

import os
from typing import Any

from xtrain.errors import BackendError

_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "RANK")


def launcher_rank() -> str:
    """This process's rank as the launcher wrote it, for messages before MPI can be asked; "?" without one."""
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "?")


def load() -> Any:
    """The module mpi4py.MPI. The first import starts MPI in this process.

    Raises:
        BackendError: mpi4py is not installed, finds no MPI library, or MPI allows no second thread.
    """
    place = f"backend mpi, rank {launcher_rank()}"
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{place}: the Python package {error.name} is not installed: pip install 'xtrain[mpi]' (with MPICH), "
            "or mpi4py alone where the cluster has its own MPI"
        ) from error
    except (RuntimeError, ImportError) as error:
        cause = str(error).strip().splitlines()[0]
        raise BackendError(
            f"{place}: mpi4py finds no MPI library ({cause}): load the cluster's MPI module, "
            "or pip install mpich"
        ) from error
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise BackendError(
            f"{place}: MPI was started without threads (level {MPI.Query_thread()}), but operations that go on "
            "in the background need MPI_THREAD_SERIALIZED: let mpi4py start MPI, with mpi4py.rc.threads left True"
        )
    return MPI
