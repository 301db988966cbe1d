"""Which machines a run gets: named in the settings, in a hostfile, or by Slurm."""

from __future__ import annotations

import os
import shutil
import subprocess

from xtrain.base.errors import ConfigError
from xtrain.launch import hostfile
from xtrain.launch.nodes import Node
from xtrain.launch.schema import ClusterSection


def find_nodes(cluster: ClusterSection) -> list[Node]:
    """The machines, in the order of their ranks.

    Raises:
        ConfigError: they contradict the settings, or there are none.
    """
    if cluster.launcher == "local":
        if cluster.nodes > 1:
            raise ConfigError(
                f"cluster.nodes={cluster.nodes} on one machine: choose cluster=hosts, slurm, mpi or kubernetes"
            )
        return [Node("localhost", cluster.ranks_per_node)]
    if cluster.launcher == "hosts" or (cluster.launcher == "mpi" and (cluster.hosts or cluster.hostfile)):
        return _named(cluster)
    if cluster.launcher == "slurm" and in_allocation():
        return _allocated(cluster)
    names = ["localhost"] if cluster.launcher == "mpi" else [f"node{index}" for index in range(cluster.nodes)]
    if cluster.launcher == "mpi" and cluster.nodes > 1:
        raise ConfigError(
            f"cluster.nodes={cluster.nodes} under mpiexec: name them in cluster.hosts or cluster.hostfile"
        )
    return [Node(name, cluster.ranks_per_node) for name in names]


def in_allocation() -> bool:
    """Whether this process is in a job of Slurm: its batch script, or the shell of salloc."""
    return "SLURM_JOB_ID" in os.environ and "SLURM_JOB_NODELIST" in os.environ


def _named(cluster: ClusterSection) -> list[Node]:
    if cluster.hosts and cluster.hostfile:
        raise ConfigError("cluster.hosts and cluster.hostfile both name machines: take one of them")
    if cluster.hosts:
        lines = [
            line if "slots=" in line else f"{line} slots={cluster.ranks_per_node}" for line in cluster.hosts
        ]
        slots: dict[str, int] | None = hostfile.parse_lines(lines, "cluster.hosts")
    else:
        path = cluster.hostfile or hostfile.DEFAULT
        slots = hostfile.read(path)
        if slots is None:
            raise ConfigError(
                f"there is no hostfile {path}: name the machines with cluster.hosts=[a,b] or cluster.hostfile"
            )
    assert slots is not None
    chosen = hostfile.select(
        {host: list(range(count)) for host, count in slots.items()},
        cluster.include or "",
        cluster.exclude or "",
    )
    nodes = [
        node if node.devices != tuple(range(slots[node.name])) else Node(node.name, node.slots)
        for node in hostfile.nodes(chosen)
    ]
    if cluster.nodes > 1:
        if cluster.nodes > len(nodes):
            raise ConfigError(f"cluster.nodes={cluster.nodes}, but only {len(nodes)} machines are named")
        nodes = nodes[: cluster.nodes]
    return nodes


def _allocated(cluster: ClusterSection) -> list[Node]:
    """Of the allocation that this process is in."""
    if shutil.which("scontrol") is None:
        raise ConfigError(
            "SLURM_JOB_NODELIST is set, but there is no scontrol: put Slurm's commands on the PATH"
        )
    found = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]],
        capture_output=True,
        text=True,
        check=False,
    )
    names = found.stdout.split()
    if found.returncode or not names:
        raise ConfigError(f"scontrol cannot name the nodes of this allocation: {found.stderr.strip()}")
    if cluster.nodes > len(names):
        raise ConfigError(
            f"cluster.nodes={cluster.nodes}, but the allocation {os.environ['SLURM_JOB_ID']} has {len(names)}: "
            "ask for more, or set cluster.nodes"
        )
    wanted = names[: cluster.nodes] if cluster.nodes > 1 else names
    return [Node(name, cluster.ranks_per_node) for name in wanted]
