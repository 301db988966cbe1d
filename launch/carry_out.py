"""A checked job becomes a run here, or is handed over to who starts it later; and what is told at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from xtrain.base.files import write_text
from xtrain.base.run_folder import CURVE, METRICS
from xtrain.launch.checkpoints import AUTO, find_source
from xtrain.launch.find_nodes import in_allocation
from xtrain.launch.incidents import Incident, write_incident
from xtrain.launch.job import Job, write_run_folder
from xtrain.launch.keeper import keep
from xtrain.launch.launchers import kubernetes, slurm
from xtrain.launch.supervisor import Supervisor

Draw = Callable[[Path, Path, str, str], dict[int, float]]
"""(record, picture to write, name of the curve, title) -> its losses by step; without any, no picture."""


def _title(job: Job) -> str:
    return f"{job.model} on {job.ranks} rank{'' if job.ranks == 1 else 's'}"


def _summarise(job: Job, console: Console, seconds: float, draw: Draw) -> None:
    losses = draw(job.run_dir / METRICS, job.run_dir / CURVE, job.model, _title(job))
    if not losses:
        return
    first, last = next(iter(losses)), next(reversed(losses))
    console.print(
        f"loss {losses[first]:.4f} at step {first}, {losses[last]:.4f} at step {last}; {seconds:.0f} s; "
        f"everything is in {job.run_dir}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def _hand_over(job: Job, overrides: list[str], script_args: list[str], config_dir: str | None) -> str | None:
    """Where another program starts the run later: hand it over; what to tell the user."""
    if job.cluster.launcher == "kubernetes":
        path = job.run_dir / kubernetes.MANIFEST
        write_text(path, kubernetes.manifest(job))
        return f"start it with: kubectl apply -f {path}"
    if job.cluster.launcher == "slurm" and not in_allocation():
        number = slurm.submit(job, slurm.launch_command(overrides, script_args, job, config_dir))
        return f"submitted as job {number}; everything goes to {job.run_dir}"
    return None


def carry_out(
    job: Job,
    tree: DictConfig,
    overrides: list[str],
    script_args: list[str],
    console: Console,
    debug: bool,
    config_dir: str | None,
    draw: Draw | None = None,
) -> tuple[int, str | None]:
    """Write the run folder and run the job, or hand it over; the exit status, and what to tell of the latter."""
    with write_run_folder(job, tree, overrides):
        if (handed := _hand_over(job, overrides, script_args, config_dir)) is not None:
            return 0, handed
        console.print(
            f"{_title(job)}, run folder {job.run_dir}", highlight=False, soft_wrap=True, markup=False
        )
        start = time.monotonic()
        status = keep(lambda again: _supervise(job, console, debug, again))
        if draw is not None and (job.run_dir / METRICS).exists():
            _summarise(job, console, time.monotonic() - start, draw)
        return status, None


def _supervise(job: Job, console: Console, debug: bool, again: bool) -> int:
    """In a process of its own."""
    if again:
        write_incident(
            job.run_dir, Incident("launcher", 0, "the launcher was killed", action="is started again")
        )
        job = replace(job, source=find_source(AUTO, job.run_dir) or job.source)
    return Supervisor(job, console, debug, again).run()
