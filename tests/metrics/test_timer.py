"""Timers against a clock that the test turns, next to DeepSpeed's, and the phases of an engine."""

from __future__ import annotations

import io
import re
import time
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import xtrain
from tests import training
from xtrain.backends import host
from xtrain.base.errors import ConfigError
from xtrain.runtime.utils import see_memory_usage
from xtrain.utils.timer import NoopTimer, SynchronizedWallClockTimer, ThroughputTimer, trim_mean


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now)

    def interval(self, timer: Any, seconds: float) -> None:
        timer.start()
        self.now += seconds
        timer.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_intervals_add_up(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    timers = SynchronizedWallClockTimer()
    for seconds in (1.0, 2.0, 3.0):
        clock.interval(timers("a"), seconds)
    assert timers("a").mean() == pytest.approx(2000)
    assert timers.get_mean(["a", "absent"], reset=False) == {"a": pytest.approx(2e6)}
    timers("b").start()
    clock.now += 0.5
    assert timers("b").elapsed() == pytest.approx(500)  # and goes on
    clock.now += 0.25
    timers("b").stop()
    timers.log(["a", "absent", "b"], normalizer=2.0)
    assert capsys.readouterr().out == "[Rank 0] time (ms) | a: 3000.00 | b: 125.00\n"
    assert timers("a").elapsed() == 0
    assert set(timers.get_timers()) == {"a", "b"}
    clock.interval(timers("c"), 5.0)
    timers("c").start()
    clock.now += 1.0
    timers("c").stop(reset=True)
    assert timers("c").elapsed(reset=False) == pytest.approx(1000)
    timers.get_mean(["c"])
    assert timers("c").elapsed() == 0
    assert "mem_allocated" in timers.memory_usage()


def test_the_device_is_waited_for() -> None:
    waits: list[int] = []
    timers = SynchronizedWallClockTimer(SimpleNamespace(synchronize=lambda: waits.append(1)))  # type: ignore[arg-type]
    timers("a").start()
    timers("a").stop()
    assert len(waits) == 2


def test_mistakes_with_timers_are_told() -> None:
    timers = SynchronizedWallClockTimer()
    with pytest.raises(ConfigError, match="'a' was stopped, but"):
        timers("a").stop()
    timers("a").start()
    with pytest.raises(ConfigError, match="'a' was started twice"):
        timers("a").start()
    with pytest.raises(ConfigError, match=r"trims 0 to 0\.5"):
        trim_mean([1.0], 0.5)


def test_a_timer_that_does_nothing_has_the_methods_of_one_that_does() -> None:
    nothing, something = NoopTimer(), SynchronizedWallClockTimer()
    for name in ("get_timers", "log", "get_mean"):
        assert callable(getattr(nothing, name))
    for name in ("start", "stop", "reset", "elapsed", "mean"):
        assert callable(getattr(something("a"), name))
        getattr(nothing("a"), name)()
    assert nothing("a").elapsed(reset=False) == 0


@pytest.mark.deepspeed
@settings(deadline=None)  # the first example imports DeepSpeed
@given(st.lists(st.floats(0, 1e6), max_size=40), st.sampled_from([0.0, 0.1, 0.2, 0.4]))
def test_trimmed_means_are_deepspeeds(values: list[float], part: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        theirs = pytest.importorskip("deepspeed.utils.timer", reason="needs the extra deepspeed")
    cut = round(len(values) * part)
    if len(values) > 2 * cut or not values:
        assert trim_mean(values, part) == pytest.approx(float(theirs.trim_mean(values, part)))


@pytest.mark.deepspeed
def test_throughput_is_deepspeeds(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    theirs = pytest.importorskip("deepspeed.utils.timer", reason="needs the extra deepspeed")
    lines: dict[str, list[str]] = {"ours": [], "theirs": []}
    config = SimpleNamespace(enabled=True, synchronized=True)
    both = [
        cls(config, batch_size=12, steps_per_output=2, logging_fn=lines[name].append)
        for name, cls in (("ours", ThroughputTimer), ("theirs", theirs.ThroughputTimer))
    ]
    for step in range(8):
        if step == 5:
            for timer in both:
                timer.update_epoch_count()
        for micro in range(2):
            for timer in both:
                timer.start()
            clock.now += 0.125 * (step + 1)
            for timer in both:
                timer.stop(global_step=micro == 1)
            clock.now += 3
    assert len(lines["ours"]) == 3
    for mine, expected in zip(lines["ours"], lines["theirs"], strict=True):
        # Memory is not the same at two moments.
        (start, *numbers), (their_start, *their_numbers) = (
            [line.split(", ")[0], *(float(n) for n in re.findall(r"PerSec=([\d.]+)", line))]
            for line in (mine, expected)
        )
        assert start == their_start
        assert numbers == pytest.approx(their_numbers, rel=1e-5)
        assert [part.split("=")[0] for part in mine.split(", ")] == [
            part.split("=")[0] for part in expected.split(", ")
        ]
    assert both[0].avg_samples_per_sec() == pytest.approx(12 * 6 / (0.25 * (3 + 4 + 5 + 6 + 7 + 8)), rel=1e-5)


def test_throughput_before_anything_is_measured(clock: Clock) -> None:
    lines: list[str] = []
    timer = ThroughputTimer(SimpleNamespace(enabled=True, synchronized=False), None, 1, 1, True, lines.append)
    timer.stop(global_step=True)  # nothing was started
    for _ in range(2):
        assert timer.avg_samples_per_sec() == float("-inf")
        timer.start()
        clock.now += 0.5
        timer.stop(global_step=True)
    assert timer.avg_samples_per_sec() == pytest.approx(2, rel=1e-4)
    assert len(lines) == 2
    assert "vm %" in lines[1]
    off = ThroughputTimer(SimpleNamespace(enabled=False, synchronized=True), 4)
    off.start()
    off.stop(global_step=True)
    assert off.global_step_count == 0


def _phases(stage: int, settings: dict[str, Any]) -> tuple[list[dict[str, float]], str]:
    class Slow(nn.Module):
        """Takes 30 ms forward, 60 ms backward."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, fail: bool = False) -> torch.Tensor:
            time.sleep(0.03)
            if fail:
                raise RuntimeError("failed")
            loss = (self.weight * 1.0).sum()
            loss.register_hook(lambda _: time.sleep(0.06))
            return loss

    engine = xtrain.initialize(
        model=Slow(),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_optimization": training.zero(stage, 0),
            "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
            **settings,
        },
    )[0]
    out, seen = io.StringIO(), []
    with redirect_stdout(out):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="failed"):
                engine(fail=True)  # is not measured, and the next one is
            for _ in range(2):
                engine.backward(engine())
                engine.step()
                seen.append(engine.get_wall_clock_timers())
    return seen, out.getvalue()


@pytest.mark.parametrize("stage", [0, 2])
def test_phases_of_a_step(ranks: Any, stage: int) -> None:
    for rank, (seen, printed) in enumerate(ranks(2, _phases, stage, {"wall_clock_breakdown": True})):
        for index, times in enumerate(seen):
            batches = index % 2 + 1  # since the last update
            assert times["fwd"] >= 29 * batches
            assert times["bwd_inner"] >= 59 * batches
            assert 29 <= times["fwd_microstep"] <= times["fwd"] + 5  # two readings of the clock
            assert times["bwd"] >= times["bwd_inner"] + times["bwd_allreduce"] - 1e-6
        lines = printed.splitlines()
        assert len(lines) == (6 if rank == 0 else 0)
        if rank == 0:
            names = [re.findall(r"\| (\w+): [\d.]+", line) for line in lines]
            micro = [f"{n}_microstep" for n in ("fwd", "bwd", "bwd_inner", "bwd_allreduce", "step")]
            whole = ["fwd", "bwd", "bwd_inner", "bwd_allreduce", "step"]
            assert names == [micro, micro, whole, micro, micro, whole]


def test_without_instruments_nothing_is_measured(ranks: Any) -> None:
    seen, printed = ranks(1, _off)[0]
    assert (seen, printed) == ([{}] * 4, "")


def _off() -> tuple[list[dict[str, float]], str]:
    return _phases(1, {})


def _progress(settings: dict[str, Any]) -> tuple[list[str], float, str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("xtrain")
    logger.addHandler(handler)
    out = io.StringIO()
    try:
        engine = xtrain.initialize(
            model=training.build_model(), config=training.config(1, micro=8, **settings)
        )[0]
        with redirect_stdout(out):
            for step in range(6):
                training.engine_step(engine, step)
    finally:
        logger.removeHandler(handler)
    return lines, engine.tput_timer.avg_samples_per_sec(), out.getvalue()


def test_progress_lines(ranks: Any) -> None:
    first, second = ranks(2, _progress, {"steps_per_print": 2})
    lines = [line for line in first[0] if "step" in line]
    assert [line.split(",")[0] for line in lines] == [
        "step=2", "step=4", "epoch=0/micro_step=4/global_step=4", "step=6", "epoch=0/micro_step=6/global_step=6",
    ]  # fmt: skip
    assert re.fullmatch(r"step=2, skipped=0, lr=\[[\d.]+\], mom=\[.*\]", lines[0])
    assert "RunningAvgSamplesPerSec=" in lines[2]
    assert not [line for line in second[0] if "step=" in line]
    assert first[1] > 0
    off = ranks(2, _progress, {"steps_per_print": 2, "timers": {"throughput": {"enabled": False}}})[0]
    assert len([line for line in off[0] if "step=" in line]) == 3
    assert off[1] == float("-inf")


def test_memory_lines(ranks: Any) -> None:
    first, second = ranks(2, _progress, {"memory_breakdown": True})
    assert second[2] == ""
    heads = re.findall(r"^Engine (.*)$", first[2], re.MULTILINE)
    assert heads == 6 * [
        f"{when} {phase}" for phase in ("forward", "backward", "step") for when in ("before", "after")
    ]
    assert len(re.findall(r"^MA [\d.]+ GB Max_MA [\d.]+ GB CA [\d.]+ GB", first[2], re.MULTILINE)) == len(
        heads
    )


def test_memory_of_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    psutil = pytest.importorskip("psutil", reason="independent figures")
    process, virtual = psutil.Process(), psutil.virtual_memory()
    before, _ = host.resident()
    assert before == pytest.approx(process.memory_info().rss, rel=0.05)
    block = torch.ones(100 * 2**20, dtype=torch.uint8)
    held, peak = host.resident()
    assert held - before > 90 * 2**20
    del block
    now, still = host.resident()
    slack = 2**20  # the kernel adds its counters up now and then
    assert still + slack >= peak >= held > now + 90 * 2**20
    host.reset_peak()
    assert host.resident()[1] < peak - 50 * 2**20
    used, total = host.in_use()
    assert total == virtual.total
    assert used == pytest.approx(virtual.total - virtual.available, abs=2e9)
    see_memory_usage("silent")
    assert capsys.readouterr().out == ""
    see_memory_usage("loud", force=True)
    assert re.match(r"loud\nMA [\d.]+ GB Max_MA", capsys.readouterr().out)


def test_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    before = host.resident()[1]
    for name in ("_PROCESS", "_HOST"):
        monkeypatch.setattr(host, name, Path("/nonexistent"))
    now, peak = host.resident()
    assert now == peak >= before * 0.5
    assert host.in_use()[1] > host.in_use()[0] > 0
