"""`--dry-run`: what would run where, word for word."""

from __future__ import annotations

import shlex

from xtrain.launch.environment import visible_devices
from xtrain.launch.job import Job
from xtrain.launch.launchers.agents import agent_command
from xtrain.launch.nodes import Layout, place


def describe(job: Job) -> str:
    """Commands, environment, files, and the map of ranks to nodes and devices."""
    layout = place(job.nodes)
    lines = [f"run folder: {job.run_dir}", "", *_map(job, layout), "", "environment of every rank:"]
    lines += [f"  {key}={shlex.quote(value)}" for key, value in sorted(job.env.items())]
    lines += ["", "each rank runs:", f"  python -u {shlex.join(job.rank_command(job.source))}", ""]
    lines += ["agents are started by:"]
    lines += [f"  {shlex.join(agent_command(job.cluster, node))}" for node in layout.nodes]
    lines += ["", "ds_config.json:", *("  " + line for line in job.config_for(layout.ranks).splitlines())]
    return "\n".join(lines)


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
