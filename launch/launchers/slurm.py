"""Slurm: the batch script that starts a run inside an allocation, its submission, and being queued again.

sbatch itself, and not the submitit library: the script stays in the run folder to be read and changed, takes every
option of the site's sbatch, and no pickled function travels (docs/decisions/0013-clusters.md).
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from xtrain.base.errors import ConfigError
from xtrain.base.files import write_text
from xtrain.base.run_folder import LOGS
from xtrain.launch.job import Job
from xtrain.launch.processes import safe_path_flag

SCRIPT = "job.sh"


def batch_script(job: Job, command: list[str]) -> str:
    """A script for sbatch.

    Args:
        command: of `xtrain launch`, which the job runs, each time that it is started.
    """
    settings = job.cluster.slurm
    options: dict[str, str | bool] = {
        "job-name": job.run_dir.name,
        "nodes": str(len(job.nodes)),
        "ntasks-per-node": "1",
        "output": str(job.run_dir / LOGS / "slurm-%j.log"),
        "open-mode": "append",
        "no-kill": True,  # a node that fails ends its own ranks only; the run goes on without it
        "requeue" if settings.requeue else "no-requeue": True,
    }
    if settings.signal_seconds:
        options["signal"] = f"B:USR1@{settings.signal_seconds}"
    named = {
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
    }
    options |= {name: value for name, value in named.items() if value is not None}
    options |= {name.replace("_", "-"): value for name, value in settings.options.items()}
    lines = ["#!/bin/bash"]
    lines += [
        f"#SBATCH --{name}" if value is True else f"#SBATCH --{name}={value}"
        for name, value in options.items()
        if value is not False
    ]
    # exec: the warning signal goes to the batch script's own process.
    return "\n".join(
        [*lines, *settings.setup, f"cd {shlex.quote(os.getcwd())}", f"exec {shlex.join(command)}", ""]
    )


def launch_command(
    overrides: list[str], script_args: list[str], job: Job, config_dir: str | None
) -> list[str]:
    """`xtrain launch` for the batch script: the same settings, and the run folder that was chosen now."""
    kept = [item for item in overrides if not item.startswith("run_dir=")]
    if not any(item.startswith("resume=") for item in kept):
        kept.append("resume=auto")
    folder = ["--config-dir", str(Path(config_dir).absolute())] if config_dir else []
    python = job.cluster.python or sys.executable
    words = [
        python,
        *safe_path_flag(),
        "-m",
        "xtrain.cli",
        "launch",
        *folder,
        f"run_dir={job.run_dir}",
        *kept,
    ]
    return [*words, "--", *script_args] if script_args else words


def submit(job: Job, command: list[str]) -> str:
    """Write the script into the run folder and submit it; the job's number.

    Raises:
        ConfigError: sbatch is not there, or refuses the job: a queue that does not exist, say.
    """
    _check_size(job)
    script = job.run_dir / SCRIPT
    write_text(script, batch_script(job, command))
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            "there is no sbatch on this machine: submit from a login node of the cluster"
        ) from None
    if done.returncode:
        said = re.sub(r"^sbatch: (error: )?", "", done.stderr.strip(), flags=re.MULTILINE).replace("\n", "; ")
        raise ConfigError(f"sbatch refuses the job: {said}")
    return done.stdout.strip().partition(";")[0]


def _check_size(job: Job) -> None:
    """Most sites let a job wait for ever that asks for more nodes than a queue has.

    Raises:
        ConfigError: it does.
    """
    settings = job.cluster.slurm
    try:
        said = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %D"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return  # sbatch will not be there either, which is told
    sizes: dict[str, int] = {}
    for line in said.stdout.splitlines():
        name, count = line.split()
        chosen = (
            name.rstrip("*") in settings.partition.split(",") if settings.partition else name.endswith("*")
        )
        if chosen:
            sizes[name.rstrip("*")] = sizes.get(name.rstrip("*"), 0) + int(count)
    # Other clusters of the site are not seen here.
    if sizes and not {"clusters", "M"} & set(settings.options) and len(job.nodes) > max(sizes.values()):
        name = max(sizes, key=lambda key: sizes[key])
        raise ConfigError(f"cluster.nodes={len(job.nodes)}, but the queue {name} has {sizes[name]} nodes")


def requeue(job: Job, warned: bool, say: Callable[..., None]) -> None:
    """After Slurm's warning that the time slot ends: have the job queued again."""
    number = os.environ.get("SLURM_JOB_ID")
    if not (warned and number and job.cluster.launcher == "slurm" and job.cluster.slurm.requeue):
        return
    done = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True, check=False)
    if done.returncode:
        say(f"job {number} could not be queued again: {done.stderr.strip()}", "red")
    else:
        say(f"job {number} is queued again", "bold")
