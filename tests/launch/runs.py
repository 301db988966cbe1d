"""Starting `xtrain launch` from tests, and looking at what it does."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from xtrain.launch.processes import process_state

SMALL = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_size=32", "model.vocab_size=300"]
SMALL += ["train.seq_length=32", "train.micro_batch_size=4", "train.global_batch_size=8"]


def command(run_dir: Path, *args: str) -> list[str]:
    """`xtrain launch` with a run folder."""
    return [sys.executable, "-m", "xtrain.cli", "launch", f"run_dir={run_dir}", *args]


def start(run_dir: Path, *args: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a launch in the folder that holds the run folder."""
    return subprocess.Popen(
        command(run_dir, *args),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run_dir.parent,
        env={**(os.environ if env is None else env), "COLUMNS": "400"},
    )


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """Wait for its end; what it has printed."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


def run(run_dir: Path, *args: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a launch."""
    process = start(run_dir, *args, env=env)
    output = finish(process)
    return process.returncode, output


def processes_of(run_dir: Path) -> list[int]:
    """Every living rank of this run: agents and launchers are told of the folder in other ways."""
    needle = f"XTRAIN_RUN_DIR={run_dir}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if needle in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile, or is somebody else's
    return found


def rank_process(run_dir: Path, rank: int) -> int:
    """The process of a rank, started by an agent or by MPICH; there it has a witness, its parent."""
    own = {f"RANK={rank}".encode(), f"PMI_RANK={rank}".encode()}
    for pid in sorted(processes_of(run_dir), reverse=True):
        if own & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
            return pid
    raise AssertionError(f"there is no rank {rank}")


def children(pid: int) -> list[int]:
    """Processes that a process has started, and that have not ended."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and process_state(int(folder.name)) not in ("", "Z"):
            try:
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def steps(run_dir: Path) -> int:
    """Lines of steps in a run's record."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"type": "step"') if path.exists() else 0
