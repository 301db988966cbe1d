"""Hosts with disks of their own: the run folder is collected; and the deepspeed command on them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.runs import SMALL, finish, start, steps, wait_for
from tests.parity.corpus import write_corpus
from tests.services.hosts import Hosts, missing
from xtrain.align.record import read_record
from xtrain.launch.checkpoints import check_whole

pytestmark = [pytest.mark.slow, pytest.mark.services]

SCRIPT = """
import argparse, os, torch
import xtrain as deepspeed
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
args = deepspeed.add_config_arguments(parser).parse_args()
deepspeed.init_distributed()
seen = [None] * deepspeed.comm.get_world_size()
deepspeed.comm.all_gather_object(seen, (deepspeed.comm.get_rank(), args.local_rank, os.environ.get("NCCL_MINE")))
print("seen", seen, flush=True)
raise SystemExit(7 if os.environ.get("NCCL_MINE") == "fail" and deepspeed.comm.get_rank() == 1 else 0)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    if (why := missing()) is not None:
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("apart")
    (folder / "own").mkdir()
    made = Hosts(folder / "hosts", ["p", "q"], net=12, own=folder / "own")
    made.start()
    yield made
    made.stop()


def test_run_folders_apart_are_collected_and_survive_the_loss_of_a_host(hosts: Hosts, tmp_path: Path) -> None:
    """The host with rank 0 loses its power, and with it its disk; the other one goes on, to the same bits."""
    assert hosts.own is not None
    corpus = write_corpus(tmp_path, 200)
    settings = [*SMALL, f"data.path={corpus}", "train.steps=400", "train.save_interval=40"]
    settings += ["+deepspeed.xtrain.aligned=true"]
    two = ["cluster=hosts", "cluster.hosts=[p,q]", "cluster.ranks_per_node=1", "cluster.node_timeout=6"]
    two += [f"cluster.ssh.args=[-F,{hosts.ssh_config}]", "cluster.ssh.connect_timeout=3"]
    run_dir = hosts.own / "run"
    refused = start(run_dir, *settings, *two)
    assert f"node p: the run folder {run_dir} is not there" in finish(refused)
    assert refused.returncode == 2
    process = start(run_dir, *settings, *two, "cluster.shared=false")
    checkpoint = run_dir / "checkpoint" / "global_step40"
    wait_for(lambda: checkpoint.is_dir() and steps(run_dir) > 60, seconds=120)
    check_whole(checkpoint)
    hosts.kill("p")
    output = finish(process, 200)
    assert process.returncode == 0, output
    assert "going on with 1 of 2 ranks, on q" in output
    whole = tmp_path / "whole"
    process = start(whole, *settings)
    assert process.wait(120) == 0, finish(process)
    assert read_record(run_dir).losses() == read_record(whole).losses()
    hosts.boot("p")


def _deepspeed(folder: Path, hosts: Hosts, mine: str) -> subprocess.CompletedProcess[str]:
    (folder / "hostfile").write_text("p slots=1\nq slots=1\n")
    (folder / "train.py").write_text(SCRIPT)
    options = ["--hostfile", "hostfile", "--launcher_args", f"-F {hosts.ssh_config}", "train.py"]
    return subprocess.run(
        [sys.executable, "-m", "xtrain.cli", "deepspeed", *options],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "NCCL_MINE": mine},
        timeout=120,
        check=False,
    )


def test_the_deepspeed_command_on_two_hosts(hosts: Hosts, tmp_path: Path) -> None:
    done = _deepspeed(tmp_path, hosts, "x")
    assert done.returncode == 0, done.stdout + done.stderr
    for host in "pq":
        assert f"{host}: seen [(0, 0, 'x'), (1, 0, 'x')]" in done.stdout
    done = _deepspeed(tmp_path, hosts, "fail")
    assert done.returncode == 7, done.stdout + done.stderr
    assert "q ended with status 7; the other hosts are ended" in done.stdout + done.stderr
