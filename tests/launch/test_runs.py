"""Real launches: the run folder, Ctrl-C and resume, whose fault a failure was, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.parity.corpus import write_corpus
from xtrain.align.record import read_record
from xtrain.checkpoint import is_checkpoint

SMALL = ["model.num_layers=1", "model.hidden_size=32", "model.ffn_size=32", "model.vocab_size=300"]
SMALL += ["train.seq_length=32", "train.micro_batch_size=4", "train.global_batch_size=8"]
SCRIPT = """
import sys, time, torch
import xtrain as deepspeed
deepspeed.init_distributed()
engine, *_ = deepspeed.initialize(model=torch.nn.Linear(4, 4), config={
    "train_batch_size": 4, "optimizer": {"type": "AdamW"}})
for step in range(100000):
    if step == 3 and engine.global_rank == 1:
        CODE
    loss = engine(torch.randn(2, 4)).square().mean()
    engine.backward(loss)
    engine.step()
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text"), 200)


def _start(run_dir: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "xtrain.cli", "launch", f"run_dir={run_dir}", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=run_dir.parent,
        env={**os.environ, "COLUMNS": "400"},
    )


def _finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def _processes_of(run_dir: Path) -> list[int]:
    """Every living process that was started for this run."""
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


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"type": "step"') if path.exists() else 0


def test_run_folder_interruption_and_resume(tmp_path: Path, corpus: Path) -> None:
    """A run stopped by Ctrl-C and continued is, to the bit, the run that was left alone."""
    args = [*SMALL, "train.steps=60", f"data.path={corpus}"]
    whole = tmp_path / "whole"
    process = _start(whole, *args)
    output = _finish(process)
    assert process.returncode == 0, output
    assert "step 60/60 · loss " in output
    assert "tokens/s" in output
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "config.yaml", "ds_config.json", "overrides.json", "metrics.jsonl", "curve.png", "logs", "checkpoint",
    }  # fmt: skip
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["steps"] == 60
    assert json.loads((whole / "ds_config.json").read_text())["train_batch_size"] == 8
    assert "step 60/60" in (whole / "logs" / "rank0.log").read_text()
    assert (whole / "logs" / "rank1.log").exists()
    assert is_checkpoint(whole / "checkpoint")

    stopped = tmp_path / "stopped"
    process = _start(stopped, *args)
    _wait_for(lambda: _steps(stopped) >= 3)
    process.send_signal(signal.SIGINT)
    output = _finish(process)
    assert process.returncode == 130, output
    assert _processes_of(stopped) == []
    assert is_checkpoint(stopped / "checkpoint")
    assert _steps(stopped) < 60

    process = _start(stopped, f"resume={stopped}")  # the settings are the interrupted run's own
    output = _finish(process)
    assert process.returncode == 0, output
    losses = read_record(stopped).losses()
    assert list(losses) == list(range(1, 61))
    assert losses == read_record(whole).losses()


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (
            r"raise ValueError('on \[/INST\] [purpose]')",
            1,
            r"rank 1 failed: ValueError: on \[/INST\] [purpose]; all",
        ),
        ("import os; os.kill(os.getpid(), 9)", 1, "rank 1 was killed by SIGKILL"),
        ("sys.exit(3)", 1, "rank 1"),
        (
            "from xtrain.base.errors import DataError; raise DataError('bad data')",
            2,
            "xtrain: error: bad data",
        ),
    ],
)
def test_the_culprit_is_named_and_all_ranks_end(tmp_path: Path, code: str, status: int, said: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("CODE", code))
    run_dir = tmp_path / "run"
    process = _start(run_dir, f"script={script}")
    output = _finish(process)
    assert process.returncode == status
    assert said in output
    assert "Traceback" not in output
    assert _processes_of(run_dir) == []


def test_killing_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("CODE", "pass"))
    run_dir = tmp_path / "run"
    process = _start(run_dir, f"script={script}", "script_args=[--mine]", "--", "--more=1")
    _wait_for(lambda: _steps(run_dir) >= 1)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["script_args"] == ["--mine", "--more=1"]
    second = _start(run_dir, f"script={script}")
    assert "holds a run already" in _finish(second)
    assert second.returncode == 2
    assert len(_processes_of(run_dir)) >= 3
    process.kill()
    process.wait()
    _wait_for(lambda: _processes_of(run_dir) == [], seconds=20)


def test_an_empty_corpus_is_found_by_the_ranks(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    process = _start(tmp_path / "run", f"data.path={empty}")
    output = _finish(process)
    assert process.returncode == 2
    assert "xtrain: error: the corpus is empty" in output
    assert "Traceback" not in output
    assert _processes_of(tmp_path / "run") == []
