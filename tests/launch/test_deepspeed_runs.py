"""Ranks that `xtrain deepspeed` really starts on this machine. The launcher runs in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from xtrain.launch.deepspeed import command as deepspeed_command
from xtrain.launch.deepspeed import shims

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
rank, what = os.environ["RANK"], sys.argv[-1]
if what == "stay":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path(f"pid{rank}").write_text(str(os.getpid()))
if what == "again":
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sys.exit(1)
    sys.exit(0)
if what == "tell":
    told = {"args": sys.argv[1:], "cores": sorted(os.sched_getaffinity(0)), "threads": os.environ["OMP_NUM_THREADS"]}
    print(json.dumps(told))
    sys.exit(0)
while rank == "1" and what in ("fail", "die") and not Path("pid0").exists():
    time.sleep(0.01)
if rank == "1" and what == "fail":
    sys.exit(3)
if rank == "1" and what == "die":
    os.kill(os.getpid(), 9)
time.sleep(300)
"""
TRAINING = """
import argparse, os
import torch
import deepspeed
from deepspeed.runtime.config import DeepSpeedConfig
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
args = deepspeed.add_config_arguments(parser).parse_args()
assert args.local_rank == int(os.environ["LOCAL_RANK"])
deepspeed.init_distributed()
engine, *_ = deepspeed.initialize(args=args, model=torch.nn.Linear(4, 4), config={
    "train_batch_size": 4, "optimizer": {"type": "AdamW"}})
loss = engine(torch.randn(2, 4)).square().mean()
engine.backward(loss)
engine.step()
package = deepspeed.initialize.__module__.partition(".")[0]
print(f"trained {package} {engine.world_size} {engine.global_steps}")  # one write: two ranks print
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTRAIN_BACKEND", "cpu")
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def _run(*given: str) -> int:
    return deepspeed_command.main(["-q", *given])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _wait_for_end(folder: Path, ranks: int) -> None:
    """Every rank is gone, soon after the launcher."""
    pids = [int((folder / f"pid{rank}").read_text()) for rank in range(ranks)]
    until = time.monotonic() + 20
    while any(map(_is_alive, pids)):
        assert time.monotonic() < until, pids
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "status"), [("fail", 3), ("die", 128 + signal.SIGKILL)])
def test_a_rank_that_fails_ends_the_others_and_gives_the_status(
    folder: Path, capfd: pytest.CaptureFixture[str], how: str, status: int
) -> None:
    assert _run("--num_gpus=2", "script.py", how) == status
    _wait_for_end(folder, 2)
    told = capfd.readouterr().err.strip().splitlines()
    assert len(told) == 1, told  # torch's agent says nothing of its own
    assert "local rank 1 " in told[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_ranks(
    folder: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    pid_file = Path(f"/tmp/{os.getpid()}.deepspeed")
    seen: list[str] = []

    def interrupt() -> None:
        while not all((folder / f"pid{rank}").exists() for rank in range(2)):
            time.sleep(0.05)
        seen.append(pid_file.read_text())
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert _run("--num_gpus=2", "--save_pid", "script.py", "wait") == 128 + number
    thread.join()
    _wait_for_end(folder, 2)
    assert seen == [str(os.getpid())]
    assert not pid_file.exists()
    assert f"launcher pid: {os.getpid()}" in capfd.readouterr().out


def test_a_second_signal_kills(folder: Path) -> None:
    def interrupt() -> None:
        while not (folder / "pid0").exists():
            time.sleep(0.05)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=interrupt)
    thread.start()
    begun = time.monotonic()
    assert _run("--num_gpus=1", "script.py", "stay") == 128 + signal.SIGINT
    thread.join()
    _wait_for_end(folder, 1)
    assert time.monotonic() - begun < 25  # SIGTERM alone would take 30 seconds


def test_ranks_write_to_files_on_cores_of_their_own(folder: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    listed = ",".join(map(str, cores))
    status = _run(
        "--num_gpus", str(len(cores)), "--bind_cores_to_rank", "--bind_core_list", listed,
        "--enable_each_rank_log", "logs", "script.py", "$$", "${local_rank}", "tell",
    )  # fmt: skip
    assert status == 0
    for rank, core in enumerate(cores):
        (log,) = (folder / "logs").glob(f"*_rank{rank}.log")
        told = json.loads(log.read_text())
        assert told["args"] == [f"--local_rank={rank}", "$$", "${local_rank}", "tell"]
        assert told["cores"] == [core]
        assert told["threads"] == "1"


def test_elastic_ranks_are_started_again() -> None:
    assert _run("--elastic_training", "script.py", "again") == 0


def test_a_script_for_deepspeed_trains_by_the_shim(folder: Path) -> None:
    shims.write(folder / "bin", os.environ)
    (folder / "train.py").write_text(TRAINING)
    done = subprocess.run(
        ["deepspeed", "--num_gpus", "2", "--master_port", "29617", "train.py"],
        env={**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained xtrain 2 1\n") == 2
