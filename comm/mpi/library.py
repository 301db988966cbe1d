"""Loading mpi4py and its MPI library, with a clear sentence where that fails. Nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

from xtrain.base.errors import BackendError

_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "RANK")


def launcher_rank() -> str:
    """This process's rank as the launcher wrote it, for messages before MPI can be asked; "?" without one."""
    return next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "?")


_ALARM = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    sys.stderr.write(sys.argv[3] + "\\n")
    sys.stderr.flush()
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextmanager
def _alarm(seconds: float, text: str) -> Iterator[None]:
    """End this process with a sentence if the block takes longer than `seconds`.

    MPI's start waits for all processes without a limit, and holds Python's lock meanwhile: only another process can
    keep the time.
    """
    command = [sys.executable, "-I", "-S", "-c", _ALARM, str(os.getpid()), str(seconds), text]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as clock:
        try:
            yield
        finally:
            assert clock.stdin is not None
            clock.stdin.close()  # which the clock waits for


def load(timeout: timedelta | None = None) -> Any:
    """The module mpi4py.MPI. The first import starts MPI in this process.

    Args:
        timeout: how long the others may take to start MPI too; then this process is ended with a sentence, because
            MPI cannot be interrupted. None: for ever.

    Raises:
        BackendError: mpi4py is not installed, finds no MPI library, or MPI allows no second thread.
    """
    place = f"backend mpi, rank {launcher_rank()}"
    first = timeout is not None and "mpi4py.MPI" not in sys.modules and launcher_rank() != "?"
    seconds = timeout.total_seconds() if timeout is not None else 0.0
    late = (
        f"xtrain: error: {place}: MPI did not start within {seconds:g} s, so this process was ended: not every process "
        "of the job has called init_distributed with mpi; one has ended, hangs before it, or has chosen another "
        "library (config, XTRAIN_BACKEND)"
    )
    try:
        with _alarm(seconds, late) if first else nullcontext():
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
