"""`--dry-run`: what would run where, word for word."""

from __future__ import annotations

import shlex

from xtrain.launch.environment import visible_devices
from xtrain.launch.find_nodes import in_allocation
from xtrain.launch.job import Job
from xtrain.launch.launchers import kubernetes, mpi, slurm, sunway
from xtrain.launch.launchers.agents import agent_command
from xtrain.launch.nodes import Layout, place


def describe(job: Job, submission: list[str]) -> str:
    """Commands, environment, files, and the map of ranks to nodes and devices.

    Args:
        submission: what a batch script would run.
    """
    layout = place(job.nodes)
    lines = [f"run folder: {job.run_dir}", "", *_map(job, layout), "", "environment of every rank:"]
    lines += [f"  {key}={shlex.quote(value)}" for key, value in sorted(job.env.items())]
    lines += ["", *_started(job, layout, submission)]
    lines += ["", "ds_config.json:", *_indented(job.config_for(layout.ranks))]
    return "\n".join(lines)


def _started(job: Job, layout: Layout, submission: list[str]) -> list[str]:
    launcher = job.cluster.launcher
    if launcher == "kubernetes":
        return [f"{kubernetes.MANIFEST}:", *_indented(kubernetes.manifest(job))]
    if launcher in ("mpi", "sunway"):
        module = mpi if launcher == "mpi" else sunway
        return ["ranks are started by:", f"  {shlex.join(module.command(job, layout, job.env))}"]
    lines = ["each rank runs:", f"  python -u {shlex.join(job.rank_command(job.source))}", ""]
    if launcher == "slurm" and not in_allocation():
        return [*lines, f"sbatch {slurm.SCRIPT}:", *_indented(slurm.batch_script(job, submission))]
    return [
        *lines,
        "agents are started by:",
        *(f"  {shlex.join(agent_command(job.cluster, n))}" for n in layout.nodes),
    ]


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.splitlines()]


def _map(job: Job, layout: Layout) -> list[str]:
    lines = ["ranks:"]
    for placement in layout.placements:
        first, last = placement.first_rank, placement.first_rank + placement.ranks - 1
        devices = ",".join(str(placement.device(index)) for index in range(placement.ranks))
        shown = visible_devices(job, placement.node, placement.ranks)
        told = "".join(f" {name}={value}" for name, value in shown.items())
        ranks = f"rank {first}" if first == last else f"ranks {first} to {last}"
        lines.append(f"  {placement.node.name}: {ranks}, devices {devices}{told}")
    return lines
