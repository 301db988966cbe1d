"""SIGTERM and SIGHUP to ranks that xtrain's launcher has not started: all save at the same step and end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import training
from xtrain.base.errors import RunInterrupted, RunSignalled
from xtrain.base.files import remove
from xtrain.engine import leave_on_signal

ROOT = Path(__file__).resolve().parents[2]
_STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    yield
    for process in _STARTED:
        process.kill()
        process.communicate()
    _STARTED.clear()


def _start(ranks: int, folder: Path, steps: int, *words: str, **more: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("XTRAIN_R", "TORCHEL"))
    }
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        place |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-u", "-m", "tests.engine.signalled", str(folder), str(steps), *words],
                env=clean | (place if ranks > 1 else {}) | {"PYTHONPATH": str(ROOT)} | more,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    _STARTED.extend(processes)
    return processes


def _read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"ended before {text!r}: {process.communicate()[1]}")


def _end(
    processes: list[subprocess.Popen[str]], seconds: float = 60
) -> tuple[list[int], list[str], list[str]]:
    """Statuses, outputs and errors."""
    told = [process.communicate(timeout=seconds) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in told], [err for _, err in told]


def _last_step(output: str) -> int:
    return int(output.split()[-1])


@pytest.mark.slow  # four interpreters at once, and two
def test_all_ranks_save_at_the_same_step_and_the_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    undisturbed, begun = _start(2, whole, 30), _start(2, parts, 2000)
    _read_until(begun[0], "step 4\n")
    begun[1].send_signal(signal.SIGTERM)  # not at the same moment, and twice, as launchers do
    time.sleep(0.15)
    for process in begun:
        process.send_signal(signal.SIGTERM)
    statuses, outputs, errors = _end(begun)
    assert statuses == [143, 143], errors
    tag = (parts / "latest").read_text().strip()
    reached = int(tag.removeprefix("global_step"))
    assert 4 < reached < 30
    assert {reached - _last_step(outputs[1])} == {1}, "saved inside step(), before the script says it"
    assert f"stopped by SIGTERM: step {reached} was saved in {parts}" in errors[0]
    assert "Traceback" not in errors[0] + errors[1]
    for finished in (undisturbed, _start(2, parts, 30)):
        statuses, _, errors = _end(finished)
        assert statuses == [0, 0], errors
    assert torch.load(whole / "weights.pt") == torch.load(parts / "weights.pt")


def test_a_lone_process_and_two_engines(tmp_path: Path) -> None:
    (lone,) = _start(1, tmp_path, 2000, "two")
    _read_until(lone, "step 2\n")
    lone.send_signal(signal.SIGHUP)
    (status,), _, (error,) = _end([lone])
    assert status == 129, error
    assert (tmp_path / "latest").is_file()
    assert (tmp_path / "engine1" / "latest").is_file()
    assert "stopped by SIGHUP: step " in error
    assert f" was saved in {tmp_path}/engine1" in error
    remove(tmp_path / "latest")
    (lone,) = _start(1, tmp_path, 2000, "unsaved")
    _read_until(lone, "step 2\n")
    lone.send_signal(signal.SIGTERM)
    (status,), _, (error,) = _end([lone])
    assert status == 143
    assert "was not saved, since the script has not saved or loaded a checkpoint" in error
    assert not (tmp_path / "latest").exists()


def test_a_signal_to_one_rank_only(tmp_path: Path) -> None:
    begun = _start(2, tmp_path, 2000, "impatient")
    _read_until(begun[0], "step 3\n")
    begun[1].send_signal(signal.SIGTERM)
    statuses, _, errors = _end(begun)
    assert statuses[1] == -signal.SIGTERM, errors
    assert (
        "rank 1 ends because of SIGTERM, and has saved nothing: not every rank got a signal within 2 s"
        in errors[1]
    )
    assert statuses[0] == 1
    assert "PeerLostError" in errors[0]


def test_a_rank_whose_peer_has_died_ends_soon(tmp_path: Path) -> None:
    begun = _start(2, tmp_path, 2000, "sleepy")
    _read_until(begun[0], "step 1\n")
    _read_until(begun[1], "step 1\n")
    begun[1].kill()
    begun[1].wait()
    begun[0].send_signal(signal.SIGTERM)
    since = time.monotonic()
    (status,), _, (error,) = _end(begun[:1])
    assert time.monotonic() - since < 10
    assert status == -signal.SIGTERM
    assert "rank 0 ends because of SIGTERM, and has saved nothing: rank 1 has ended" in error


def test_an_engine_that_takes_no_step_any_more_ends(tmp_path: Path) -> None:
    """Its script sleeps, or evaluates: nothing would save."""
    begun = _start(2, tmp_path, 2000, "idle")
    for process in begun:
        _read_until(process, "step 1\n")
    time.sleep(0.5)
    since = time.monotonic()
    for process in begun:
        process.send_signal(signal.SIGTERM)
    statuses, _, errors = _end(begun)
    assert time.monotonic() - since < 30
    assert -signal.SIGTERM in statuses
    assert any("has saved nothing: no step has begun for" in error for error in errors), errors


def test_in_a_run_folder_a_signal_raises_the_recorders_flag(tmp_path: Path) -> None:
    begun = _start(2, tmp_path / "elsewhere", 2000, "unsaved", XTRAIN_RUN_DIR=str(tmp_path))
    _read_until(begun[0], "step 2\n")
    begun[1].send_signal(signal.SIGTERM)
    statuses, _, errors = _end(begun)
    assert 0 not in statuses
    assert all("RunInterrupted" in error for error in errors)
    assert (tmp_path / "checkpoint" / "latest").is_file()
    about = json.loads((tmp_path / "logs" / "signalled.json").read_text())
    assert (about["rank"], about["signal"]) == (1, "SIGTERM")
    assert abs(about["time"] - time.time()) < 60


def _ended_as_children_end() -> bool:
    """A forked child dies of SIGTERM, as DataLoader's workers have to."""
    child = os.fork()
    if child == 0:
        reset = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and leave_on_signal._state.pipe is None
        time.sleep(60 if reset else 0)
        os._exit(1)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _handlers() -> tuple[bool, bool, bool, bool]:
    own = lambda *_: None  # noqa: E731 - a script's handler
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, own)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        engine, *_ = xtrain.initialize(model=training.build_model(), config=training.config())
        kept = signal.getsignal(signal.SIGTERM) is own
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        engine, *_ = xtrain.initialize(model=training.build_model(), config=training.config())
        ours = signal.getsignal(signal.SIGTERM) is leave_on_signal._handle
        died = _ended_as_children_end()
        engine.destroy()
        return kept, ignored, ours, died
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_handlers_of_the_script_are_kept_and_children_have_none(ranks: Any) -> None:
    assert ranks(1, _handlers) == [(True, True, True, True)]


def test_the_error_is_an_exit_and_an_interrupt() -> None:
    import pickle

    error = RunSignalled("words", 143)
    assert isinstance(error, RunInterrupted)
    assert isinstance(error, SystemExit)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.code) == ("words", 143)


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        command += ["--master-port", str(probe.getsockname()[1])]
    torchrun = subprocess.Popen(
        [*command, "-m", "tests.engine.signalled", str(tmp_path), "2000"],
        env={name: value for name, value in os.environ.items() if not name.startswith("XTRAIN_R")},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _STARTED.append(torchrun)
    _read_until(torchrun, "step 3\n")
    torchrun.send_signal(signal.SIGTERM)
    (status,), _, (error,) = _end([torchrun])
    assert status != 0
    assert "stopped by SIGTERM: step " in error
    assert (tmp_path / "latest").is_file()
