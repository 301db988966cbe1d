"""The mpiexec command of MPICH, Open MPI and Intel MPI."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from xtrain.base.errors import ConfigError
from xtrain.launch.job import Job
from xtrain.launch.nodes import Layout
from xtrain.launch.processes import free_port


def program(command: str) -> str:
    """Where the command is: on the PATH, or beside this Python, where the wheels of MPICH put it.

    Raises:
        ConfigError: it is not there.
    """
    found = shutil.which(command) or shutil.which(command, path=str(Path(sys.executable).parent))
    if found is None:
        raise ConfigError(
            f"there is no {command} on this machine: install an MPI, or name it with cluster.mpi.command"
        )
    return found


@cache
def flavour(command: str) -> str:
    """mpich, openmpi or intel, as the command itself says.

    Raises:
        ConfigError: it is of another kind.
    """
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    text = said.stdout + said.stderr
    for word, name in (
        ("Intel", "intel"),
        ("Open MPI", "openmpi"),
        ("OpenRTE", "openmpi"),
        ("HYDRA", "mpich"),
    ):
        if word in text:
            return name
    raise ConfigError(
        f"{command} does not say of which MPI it is: set cluster.mpi.flavour to mpich, openmpi or intel"
    )


def command(job: Job, layout: Layout, environment: dict[str, str]) -> list[str]:
    """mpiexec with hosts, environment and what each rank runs.

    Raises:
        ConfigError: nodes with different numbers of ranks, or with chosen devices.
    """
    settings = job.cluster.mpi
    mpiexec = program(settings.command)
    kind = settings.flavour or flavour(mpiexec)
    here = all(node.name == "localhost" for node in layout.nodes)
    if any(node.devices is not None for node in layout.nodes):
        raise ConfigError("include and exclude of single slots need agents: choose cluster=hosts")
    words = [mpiexec, "-n", str(layout.ranks)]
    environment = {**environment, "MASTER_PORT": str(job.cluster.master_port or free_port())}
    if not here:
        environment.setdefault("MASTER_ADDR", layout.nodes[0].name)
        words += _hosts(kind, layout)
    if kind == "openmpi":
        words += [word for key, value in sorted(environment.items()) for word in ("-x", f"{key}={value}")]
    else:
        words += [word for key, value in sorted(environment.items()) for word in ("-genv", key, value)]
    return [*words, *settings.args, job.cluster.python or sys.executable, "-u", *job.rank_command(job.source)]


def _hosts(kind: str, layout: Layout) -> list[str]:
    if kind == "openmpi":
        return ["--host", ",".join(f"{node.name}:{node.slots}" for node in layout.nodes)]
    counts = {placement.ranks for placement in layout.placements}
    if len(counts) > 1:
        raise ConfigError("nodes with different numbers of slots need Open MPI, or cluster=hosts")
    return ["-ppn", str(counts.pop()), "-hosts", ",".join(node.name for node in layout.nodes)]
