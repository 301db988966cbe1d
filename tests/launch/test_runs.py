"""Real launches: the run folder, Ctrl-C and resume, whose fault a failure was, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.comm.store.tools import listening, not_loopback
from tests.launch.conftest import curve
from tests.launch.runs import SMALL, children, finish, processes_of, start, steps, wait_for
from tests.parity.corpus import write_corpus
from xtrain.align.record import read_record
from xtrain.checkpoint import is_checkpoint
from xtrain.checkpoint.contents import complete_tags
from xtrain.launch.incidents import read_incidents

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


def test_run_folder_interruption_and_resume(tmp_path: Path, corpus: Path) -> None:
    """A run stopped by Ctrl-C and continued is, to the bit, the run that was left alone."""
    args = [*SMALL, "train.steps=60", f"data.path={corpus}"]
    whole = tmp_path / "whole"
    process = start(whole, *args)
    output = finish(process)
    assert process.returncode == 0, output
    assert "step 60/60 · loss " in output
    assert "tokens/s" in output
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "config.yaml", "ds_config.json", "overrides.json", "signatures.json", "metrics.jsonl", "curve.png", "logs",
        "checkpoint",
    }  # fmt: skip
    assert (whole / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((whole / "config.yaml").read_text())["train"]["steps"] == 60
    assert json.loads((whole / "ds_config.json").read_text())["train_batch_size"] == 8
    assert "step 60/60" in (whole / "logs" / "rank0.log").read_text()
    assert (whole / "logs" / "rank1.log").exists()
    assert is_checkpoint(whole / "checkpoint")

    stopped = tmp_path / "stopped"
    process = start(stopped, *args)
    wait_for(lambda: steps(stopped) >= 3)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert processes_of(stopped) == []
    assert is_checkpoint(stopped / "checkpoint")
    assert steps(stopped) < 60

    process = start(stopped, f"resume={stopped}")  # the settings are the interrupted run's own
    output = finish(process)
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
    process = start(run_dir, f"script={script}")
    output = finish(process)
    assert process.returncode == status
    assert said in output
    assert "Traceback" not in output
    assert processes_of(run_dir) == []


def test_killing_the_launcher_leaves_nothing(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("CODE", "pass"))
    run_dir = tmp_path / "run"
    process = start(run_dir, f"script={script}", "script_args=[--mine]", "--", "--more=1")
    wait_for(lambda: steps(run_dir) >= 1)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["script_args"] == ["--mine", "--more=1"]
    second = start(run_dir, f"script={script}")
    assert "holds a run already" in finish(second)
    assert second.returncode == 2
    ranks = processes_of(run_dir)
    assert len(ranks) == 2
    # Whoever is on the network reaches nothing: neither the run's store, which the agent keeps, nor gloo in the ranks.
    agent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (agent, *ranks):
        assert listening(pid)
        assert not_loopback(listening(pid)) == set()
    process.kill()
    process.wait()
    wait_for(lambda: processes_of(run_dir) == [], seconds=20)
    assert is_checkpoint(
        run_dir / "checkpoint"
    )  # the launcher proper has lost its keeper, and has the ranks save


def test_a_killed_launcher_is_started_again(
    settings: list[str], undisturbed: list[tuple[int, float]], tmp_path: Path
) -> None:
    """Its ranks end with it; the run goes on from the newest checkpoint, with the bits of an undisturbed one."""
    run_dir = tmp_path / "run"
    process = start(run_dir, *settings, "cluster.ranks_per_node=2")
    wait_for(lambda: is_checkpoint(run_dir / "checkpoint") and steps(run_dir) >= 25)
    (launcher,) = children(process.pid)
    os.kill(launcher, signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert "the launcher was killed by SIGKILL; it is started again" in output
    assert "1 incident (incidents.jsonl); goodput" in output
    (incident,) = read_incidents(run_dir)
    assert (incident["kind"], incident["cause"]) == ("launcher", "the launcher was killed")
    assert complete_tags(run_dir / "checkpoint") == [f"global_step{step}" for step in (60, 80, 100)]  # keep=3
    assert curve(run_dir) == undisturbed


def test_an_empty_corpus_is_found_by_the_ranks(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    process = start(tmp_path / "run", f"data.path={empty}")
    output = finish(process)
    assert process.returncode == 2
    assert "xtrain: error: the corpus is empty" in output
    assert "Traceback" not in output
    assert processes_of(tmp_path / "run") == []
