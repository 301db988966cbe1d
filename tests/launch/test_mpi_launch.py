"""`xtrain launch cluster=mpi` under the installed MPICH: the same bits, and a rank that is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.comm.test_mpi import needs_mpi
from tests.launch.conftest import curve
from tests.launch.runs import finish, processes_of, rank_process, start, steps, wait_for
from xtrain.checkpoint import is_checkpoint
from xtrain.launch.incidents import read_incidents

pytestmark = [pytest.mark.mpi, needs_mpi]


@pytest.mark.parametrize("killed", [False, True])
def test_under_mpiexec_the_curve_is_that_of_a_local_run(
    settings: list[str], undisturbed: list[tuple[int, float]], tmp_path: Path, killed: bool
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, *settings, "cluster=mpi", "cluster.ranks_per_node=2")
    if killed:
        wait_for(lambda: steps(run_dir) >= 25 and is_checkpoint(run_dir / "checkpoint"), seconds=120)
        os.kill(rank_process(run_dir, 1), signal.SIGKILL)
    output = finish(process, 240)
    assert process.returncode == 0, output
    incidents = read_incidents(run_dir)
    assert [(one["kind"], one["rank"]) for one in incidents] == [("rank", 1)] * killed
    assert ("rank 1 was killed by SIGKILL" in output) is killed
    assert curve(run_dir) == undisturbed
    assert processes_of(run_dir) == []
