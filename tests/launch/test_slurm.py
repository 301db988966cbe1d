"""`xtrain launch cluster=slurm` on a real Slurm of two nodes: submission, allocations, warnings, scancel, failures."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import STEPS, curve
from tests.launch.runs import command, processes_of, rank_process, run, steps, wait_for
from tests.services.slurm import Slurm
from xtrain import cli
from xtrain.checkpoint import is_checkpoint
from xtrain.launch.incidents import read_incidents

pytestmark = pytest.mark.services

TWO = ["cluster=slurm", "cluster.nodes=2"]
Curve = list[tuple[int, float]]


def _submit(cluster: Slurm, run_dir: Path, *args: str) -> str:
    """`xtrain launch` on the login node; the job's number."""
    status, output = run(run_dir, *args, env=cluster.environment)
    assert status == 0, output
    match = re.search(r"submitted as job (\d+); everything goes to", output)
    assert match, output
    return match[1]


def _output(run_dir: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((run_dir / "logs").glob("slurm-*.log")))


def _under_way(run_dir: Path, step: int = 25) -> None:
    """Until the run has a checkpoint, and steps after it."""
    wait_for(lambda: steps(run_dir) >= step and is_checkpoint(run_dir / "checkpoint"), seconds=120)


def test_a_submitted_run_has_the_curve_of_a_local_one(
    cluster: Slurm, settings: list[str], undisturbed: Curve, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = _submit(cluster, run_dir, *settings, *TWO, "cluster.slurm.time=10")
    assert cluster.wait(job) == "COMPLETED", _output(run_dir)
    assert curve(run_dir) == undisturbed
    assert f"step {STEPS}/{STEPS}" in _output(run_dir)
    assert {path.name for path in (run_dir / "logs").glob("agent-*")} == {"agent-n1.log", "agent-n2.log"}
    assert read_incidents(run_dir) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["cluster.slurm.partition=nowhere"], "sbatch refuses the job: invalid partition specified: nowhere"),
        (
            ["cluster.nodes=3", "train.global_batch_size=12"],
            "cluster.nodes=3, but the queue main has 2 nodes",
        ),
        (["+cluster.slurm.options.gres=gpu:8"], "sbatch refuses the job: Invalid generic resource (gres)"),
    ],
)
def test_jobs_that_slurm_refuses(
    cluster: Slurm, settings: list[str], tmp_path: Path, args: list[str], said: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    status = cli.main(["launch", f"run_dir={tmp_path / 'run'}", *settings, *TWO, *args])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.startswith(f"xtrain: error: {said}")
    assert err.count("\n") == 1
    assert cluster.run("squeue", "--noheader") == ""


@pytest.mark.slow
def test_inside_an_allocation_and_a_killed_rank(
    cluster: Slurm, settings: list[str], undisturbed: Curve, tmp_path: Path
) -> None:
    """The user's own batch script; a rank that dies is named with its node, and the run goes on."""
    run_dir = tmp_path / "run"
    words = command(run_dir, *settings, *TWO)
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path / 'out'}",
        f"--wrap={shlex.join(words)}",
    )  # fmt: skip
    _under_way(run_dir)
    os.kill(rank_process(run_dir, 1), signal.SIGKILL)
    assert cluster.wait(job) == "COMPLETED", (tmp_path / "out").read_text()
    assert "rank 1 on n2 was killed by SIGKILL" in (tmp_path / "out").read_text()
    (incident,) = read_incidents(run_dir)
    assert (incident["kind"], incident["node"], incident["rank"]) == ("rank", "n2", 1)
    assert curve(run_dir) == undisturbed


@pytest.mark.slow
def test_a_node_goes_down(cluster: Slurm, settings: list[str], undisturbed: Curve, tmp_path: Path) -> None:
    """The job is not ended with it (--no-kill): the run goes on, on the other node, with the same bits."""
    run_dir = tmp_path / "run"
    job = _submit(cluster, run_dir, *settings, *TWO)
    _under_way(run_dir)
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    assert cluster.wait(job) == "COMPLETED", _output(run_dir)
    assert "going on with 1 of 2 ranks, on n1" in _output(run_dir)
    assert read_incidents(run_dir)[0]["node"] == "n2"
    assert curve(run_dir) == undisturbed


@pytest.mark.slow
def test_the_warning_before_the_time_limit(
    cluster: Slurm, settings: list[str], undisturbed: Curve, tmp_path: Path
) -> None:
    """It saves, is queued again, and continues."""
    run_dir = tmp_path / "run"
    job = _submit(cluster, run_dir, *settings, *TWO)
    _under_way(run_dir)
    cluster.run("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@… does
    wait_for(lambda: f"job {job} is queued again" in _output(run_dir))
    saved = steps(run_dir)
    assert 25 <= saved < STEPS
    assert cluster.wait(job, seconds=180) == "COMPLETED", _output(run_dir)
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    assert curve(run_dir) == undisturbed


@pytest.mark.slow
def test_scancel_saves_and_the_same_command_continues(
    cluster: Slurm, settings: list[str], undisturbed: Curve, tmp_path: Path
) -> None:
    """Launcher, srun, agents and ranks get SIGTERM, all at once."""
    run_dir = tmp_path / "run"
    args = [*settings, *TWO, "resume=auto"]
    job = _submit(cluster, run_dir, *args)
    _under_way(run_dir)
    cluster.run("scancel", job)
    wait_for(lambda: cluster.states() == ["idle", "idle"])
    assert processes_of(run_dir) == []
    assert "stopped; continue with: xtrain launch resume=" in _output(run_dir)
    saved = steps(run_dir)
    assert 25 <= saved < STEPS
    assert (run_dir / "checkpoint" / "latest").read_text() == f"global_step{saved}"
    job = _submit(cluster, run_dir, *args)
    assert cluster.wait(job) == "COMPLETED", _output(run_dir)
    assert curve(run_dir) == undisturbed


MEET = """
import os, sys, torch
import xtrain as deepspeed
deepspeed.init_distributed()
sum = torch.tensor([deepspeed.comm.get_rank() + 1.0])
if deepspeed.comm.get_world_size() > 1:
    deepspeed.comm.all_reduce(sum)
said = [deepspeed.comm.get_rank(), deepspeed.comm.get_world_size(), os.environ.get("LOCAL_RANK"), sum.item()]
print(os.environ.get("SLURMD_NODENAME"), *said)
"""


@pytest.mark.slow
def test_ranks_that_srun_starts_itself(cluster: Slurm, tmp_path: Path) -> None:
    """Without `xtrain launch`; the batch script itself is alone, whatever SLURM_NTASKS says."""
    script, out = tmp_path / "meet.py", tmp_path / "out"
    script.write_text(MEET)
    python = shlex.join([sys.executable, str(script)])
    # The nodes' names lead nowhere here; on a cluster MASTER_ADDR is not needed.
    lines = [
        f"MASTER_ADDR=127.0.0.1 srun --nodes=2 --ntasks=2 {python}",
        f"srun --nodes=1 --ntasks=2 {python}",
        python,
    ]
    job = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--ntasks=4", f"--output={out}", f"--wrap={'; '.join(lines)}"
    )
    assert cluster.wait(job) == "COMPLETED", out.read_text()
    assert sorted(out.read_text().splitlines()) == sorted(
        ["n1 0 2 0 3.0", "n2 1 2 0 3.0", "n1 0 2 0 3.0", "n1 1 2 1 3.0", "n1 0 1 None 1.0"]
    )
