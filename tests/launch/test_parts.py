"""The parts of the launcher that need no processes."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from xtrain.base.errors import BackendError, PeerLostError
from xtrain.launch import rank
from xtrain.launch.compose import compose_config
from xtrain.launch.failure import Failure, culprit, from_json, killed, own_failures, rank_log, write_failure
from xtrain.launch.job import make_job
from xtrain.launch.progress import ProgressDisplay, RecordTail
from xtrain.launch.stopping import Stop, catching


def _failure(rank: int, message: str, at: float, code: int = 1) -> Failure:
    return Failure(rank, message, code, at)


def test_a_rank_with_its_own_error_is_blamed_before_those_that_noticed() -> None:
    noticed = _failure(0, "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1234", at=1.0)
    own = _failure(2, "ValueError: wrong", at=2.0)
    assert culprit([noticed, own]) is own


def test_a_killed_rank_is_blamed_before_those_that_noticed() -> None:
    noticed = _failure(0, "RuntimeError: Connection reset by peer", at=1.0)
    dead = killed(1, -9)
    assert culprit([noticed, dead]) is dead
    assert "SIGKILL" in dead.message
    assert "memory" in dead.message


def test_ranks_that_the_agent_ended_are_not_blamed() -> None:
    ended, own = killed(0, -15), _failure(1, "KeyError: 'x'", at=9.0)
    assert culprit([ended, own]) is own
    assert culprit([]) is None


def test_the_earliest_of_several_errors_is_blamed() -> None:
    late, early = _failure(0, "ValueError: b", at=2.0), _failure(3, "ValueError: a", at=1.0)
    assert culprit([late, early]) is early


def test_failures_are_collected_from_files_and_exit_codes(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    write_failure(tmp_path, _failure(1, "ValueError: a", at=1.0))
    rank_log(tmp_path, 2).write_text("one\n\ntwo\n")
    failures = [from_json(entry) for entry in own_failures(tmp_path, {1: 1, 2: -11}, "a")]
    assert [(f.rank, f.message, f.host, f.lines) for f in failures] == [
        (1, "ValueError: a", "a", ()),
        (2, "was killed by SIGSEGV", "a", ("one", "two")),
    ]


def _step(number: int, seconds: float = 0.5) -> dict[str, object]:
    return {"type": "step", "step": number, "loss": 2.0, "seconds": seconds, "tokens": 100}


def test_the_tail_returns_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = RecordTail(path)
    assert tail.new_steps() == []
    lines = [json.dumps({"type": "header"}), json.dumps(_step(1)), json.dumps(_step(2))]
    text = "\n".join(lines)
    path.write_text(text[:-5])
    assert [step["step"] for step in tail.new_steps()] == [1]
    path.write_text(text + "\n")
    assert [step["step"] for step in tail.new_steps()] == [2]
    assert tail.new_steps() == []


def test_figures_are_right() -> None:
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, width=200), 100, "m", seconds_between_lines=0.0)
    display.update([_step(n) for n in range(1, 11)])
    assert display.figures() == "loss 2.0000 · 200 tokens/s · 0:45 left"
    assert out.getvalue() == "step 10/100 · loss 2.0000 · 200 tokens/s · 0:45 left\n"


@pytest.mark.parametrize("total", [None, 20])
def test_the_bar_on_a_terminal(total: int | None) -> None:
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, width=120, force_terminal=True), total, "glm_tiny")
    display.update([_step(7)])
    display.close()
    assert "glm_tiny" in out.getvalue()
    assert "loss 2.0000" in out.getvalue()


def test_a_lost_peer_is_not_the_culprit() -> None:
    lost = PeerLostError("backend gloo, rank 0 of 2: all_reduce cannot finish: rank 1 has ended")
    noticed = rank._failure(0, lost)
    assert noticed.is_consequence
    own = Failure(1, "ValueError: unreadable", 1, noticed.time + 5)
    assert culprit([noticed, own]) is own
    assert not rank._failure(0, BackendError("backend 'cuda' cannot be used here")).is_consequence


def _leave_for(error: BackendError) -> None:
    try:
        raise error
    except BackendError:
        sys.exit(error.exit_code)


def test_a_script_that_leaves_for_a_lost_peer_is_not_the_culprit(tmp_path: Path) -> None:
    """As the example does: every error of xtrain becomes an exit status of 2. The words of the error don't matter."""
    for error, consequence in (
        (PeerLostError("rank 1 has died"), True),
        (BackendError("no such chip"), False),
    ):
        with pytest.raises(SystemExit) as left:
            _leave_for(error)
        rank_log(tmp_path, 0).parent.mkdir(exist_ok=True)
        rank_log(tmp_path, 0).write_text(f"train.py: error: {error}\n")
        failure = rank._left(tmp_path, 0, left.value)
        assert (failure.exit_code, failure.is_consequence) == (2, consequence)
        killed_rank = killed(1, -9)
        assert culprit([failure, killed_rank]) is (killed_rank if consequence else failure)


def test_the_launcher_names_the_backend_to_its_ranks(tmp_path: Path) -> None:
    for overrides, named in (([], None), (["backend=sunway"], "sunway")):
        config, _ = compose_config([f"run_dir={tmp_path / 'run'}", *overrides])
        assert make_job(config, []).env.get("XTRAIN_BACKEND") == named


def test_the_emulated_chip_is_chosen_with_the_backend(tmp_path: Path) -> None:
    for overrides, expected in (
        (["backend=fake_a100_tf32"], {"profile": "a100-tf32"}),
        (
            ["backend=fake", "backend.fake.profile=custom", "+backend.fake.numerics.block=8"],
            {"profile": "custom", "numerics": {"block": 8}},
        ),
        (["backend=cpu"], None),
    ):
        config, _ = compose_config([f"run_dir={tmp_path / 'run'}", *overrides])
        assert make_job(config, []).deepspeed_config["xtrain"]["fake"] == expected


def test_one_scancel_is_one_request_and_a_second_ctrl_c_another(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.2, 12.0, 13.5])
    monkeypatch.setattr("xtrain.launch.stopping.time.monotonic", lambda: next(now))
    stop = Stop()
    assert not stop.asked
    stop.ask(signal.SIGTERM)
    stop.ask(signal.SIGTERM)  # to all processes at once, and through the keeper
    assert stop.asked
    assert not stop.at_once
    stop.ask(signal.SIGINT)
    assert not stop.at_once
    stop.ask(signal.SIGINT)
    assert stop.at_once
    assert stop.since == 10.0
    assert not stop.warned


def test_signals_are_collected_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    stop = Stop()
    with catching(stop):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.warned
    assert signal.getsignal(signal.SIGUSR1) is before
