"""Steps that are counted otherwise: from 0, a step late, or in samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.align.logs import table, trainer_state
from tests.align.records import make, write
from xtrain import cli
from xtrain.align.alignment import align, align_records
from xtrain.align.compare import Policy
from xtrain.align.module_table import ModuleTable
from xtrain.align.record import UNKNOWN
from xtrain.align.sources import read_curve
from xtrain.align.sources.names import find_others, unit_of
from xtrain.base.errors import RecordError


def _losses(steps: int = 40) -> dict[int, float]:
    draw = np.random.default_rng(0)
    return {step: float(3 + draw.standard_normal()) for step in range(1, steps + 1)}


def _moved(losses: dict[int, float], by: int) -> dict[int, float]:
    return {step + by: loss for step, loss in losses.items()}


def test_a_run_that_counts_from_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", _losses())
    two = write(tmp_path / "two.jsonl", _moved(_losses(), -1))
    assert cli.main(["align", str(one), str(two)]) == 2
    said = capsys.readouterr().err
    assert "two.jsonl is shifted by one step against" in said
    assert "pass --shift 1" in said
    assert said.count("\n") == 1
    assert cli.main(["align", str(one), str(two), "--shift", "1", "--policy", "exact"]) == 0
    assert "note: the candidate: +1 was added to its step numbers" in capsys.readouterr().out
    with pytest.raises(RecordError, match=r"shifted by one step .* pass --shift -1"):
        align(two, one)
    assert align(two, one, "exact", shift=-1).exit_code == 0
    # What departs departs: another shift explains nothing.
    other = write(tmp_path / "other.jsonl", {**_moved(_losses(), -1), 20: 9.0})
    assert align(one, other).exit_code == 1
    assert align(one, other, shift=1).began == 21
    with pytest.raises(RecordError, match=r"shift is a whole number of steps, such as 1 or -1, not 1.5"):
        align(one, two, shift=1.5)  # type: ignore[arg-type]
    assert cli.main(["align", str(one), str(two), "--shift", "9" * 30]) == 2
    assert "shift is a whole number of steps, such as 1 or -1, not 999" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["align", str(one), str(two), "--shift", "x"])


def test_a_smooth_curve_that_agrees_either_way_is_told_as_well() -> None:
    smooth = {step: 2 + 1 / (10 + step) for step in range(1, 200)}
    with pytest.raises(RecordError, match="shifted by one step"):
        align_records(make(smooth), make(_moved(smooth, -1)), Policy("relative", 0.02))
    flat = dict.fromkeys(range(1, 200), 2.0)
    found = align_records(make(flat), make(_moved(flat, -1)), Policy("exact"))
    assert (found.aligned, found.exit_code) == (True, 2)


def test_a_little_nearer_is_not_shifted() -> None:
    """By a mean of 2 % a noisy curve may be inside when shifted, and outside when not: that says nothing."""
    draw = np.random.default_rng(0)
    one, two = (3 + 0.1 * draw.standard_normal(60) for _ in range(2))
    apart = np.abs(two / one - 1).mean()
    moved = np.abs(two[1:] / one[:-1] - 1).mean()
    losses = [dict(zip(range(1, 61), values.tolist(), strict=True)) for values in (one, two)]
    policy = Policy("mean", (apart + moved) / 2 if moved < apart else apart * 0.999)
    assert not any("shifted" in h for h in align_records(make(losses[0]), make(losses[1]), policy).hints)


def test_data_that_are_a_step_behind_are_a_hint() -> None:
    losses = _losses()
    behind = {step: losses[max(1, step - 1)] for step in losses}
    found = align_records(make(losses), make(behind), Policy("relative", 0.02))
    assert found.exit_code == 1
    assert any(
        "the candidate is shifted by one step: with -1 on its step numbers (--shift -1) the curves agree: its data or "
        "its schedule are a step behind" in hint
        for hint in found.hints
    )
    ahead = {step: losses.get(step + 1, 3.0) for step in range(1, 40)}
    found = align_records(make(losses), make(ahead), Policy("relative", 0.02))
    assert any("a step ahead" in hint for hint in found.hints)
    again = align_records(make(losses), make({**losses, 20: 9.0}), Policy("relative", 0.02))
    assert not any("shifted" in hint for hint in again.hints)


def test_shifted_windows(tmp_path: Path) -> None:
    losses = _losses()
    windows = trainer_state(tmp_path / "a.json", losses, list(range(5, 41, 5)), 5)
    from_zero = write(tmp_path / "b.jsonl", _moved(losses, -1))
    with pytest.raises(RecordError, match=r"shifted by one step .* pass --shift 1"):
        align(windows, from_zero, "exact")
    with pytest.raises(RecordError, match=r"shifted by one step .* pass --shift -1"):
        align(from_zero, windows, "exact")
    assert align(windows, from_zero, "exact", shift=1).exit_code == 0
    assert align(from_zero, windows, "exact", shift=-1).exit_code == 0


def test_everything_is_shifted() -> None:
    record = make(_losses(2), headers=[{"from_step": 0}, {"from_step": 1}])
    record.begins = np.array([UNKNOWN, 1])
    record.modules = ModuleTable(["a"])
    record.modules.put("forward", "rms", np.array([1]), np.ones((1, 1), np.float32))
    moved = record.shifted(3)
    assert moved.step.tolist() == [4, 5]
    assert moved.restarts() == [4]
    assert moved.begins is not None
    assert moved.begins.tolist() == [UNKNOWN, 4]
    assert moved.modules is not None
    assert moved.modules.steps["forward"].tolist() == [4]
    assert record.step.tolist() == [1, 2]
    assert record.modules.steps["forward"].tolist() == [1]


def test_names_that_say_what_is_counted() -> None:
    for curve, axis, file, unit in (
        ("Train/Samples/train_loss", None, "", "samples"),
        ("lm loss vs samples", None, "", "samples"),
        ("train_loss", "step", "Train_Samples_train_loss", "samples"),
        ("Value", "Step", "run-.-tag-Train_Samples_train_loss", "samples"),
        ("Value", "Step", "run-.-tag-lm loss vs samples", "samples"),
        ("loss", "step", "train_samples_of_mine", "steps"),
        ("loss", "consumed_tokens", "", "tokens"),
        ("train/loss", "step", "samples", "steps"),
        ("lm loss", None, "train_samples", "steps"),
    ):
        assert unit_of(curve, axis, file) == unit
    names = ["learning-rate", "learning-rate vs samples", "grad-norm"]
    assert find_others(names, "samples", shared=False) == {"lr": "learning-rate vs samples"}
    assert find_others(names, "steps", shared=False) == {"lr": "learning-rate", "grad_norm": "grad-norm"}


def test_samples_are_not_compared_with_steps(tmp_path: Path) -> None:
    losses = _losses()
    steps = write(tmp_path / "steps.jsonl", losses)
    texts = [repr(loss) for loss in losses.values()]
    samples = [str(32 * step) for step in losses]
    monitor = table(tmp_path / "Train_Samples_train_loss.csv", {"step": samples, "train_loss": texts})
    named = table(tmp_path / "named.csv", {"consumed_samples": samples, "loss": texts})
    for path in (monitor, named):
        with pytest.raises(RecordError, match=rf"steps.jsonl counts steps and {path} counts samples: "):
            align(steps, path)
        with pytest.raises(RecordError, match="counts samples and "):
            align(path, steps)
    assert align(monitor, named, "exact").exit_code == 0
    rows = tmp_path / "mixed.jsonl"
    rows.write_text("\n".join(map(json.dumps, [{"step": 1, "loss": 2.5}, {"tokens": 9, "loss": 2.5}])))
    with pytest.raises(RecordError, match="line 2 counts 'tokens', and the first line 'step'"):
        read_curve(rows)


def test_numbers_that_may_be_samples_are_told_with_care(tmp_path: Path) -> None:
    losses = _losses(100)
    steps = write(tmp_path / "steps.jsonl", losses)
    texts = [repr(loss) for loss in losses.values()]
    path = table(tmp_path / "x.csv", {"step": [str(32 * step) for step in losses], "loss": texts})
    # Three steps in common, which differ; divided by 32, all agree.
    with pytest.raises(
        RecordError, match=r"only multiples of 32 .* may count samples or tokens .* curves agree once"
    ):
        align(steps, path)
    few = write(tmp_path / "few.jsonl", {step: losses[step] for step in range(1, 20)})
    with pytest.raises(
        RecordError, match=r"no step in common: .* 1 to 19 and 32 to 3200; .* may count samples"
    ):
        align(few, path)
    # Every tenth step is no count of samples.
    tenth = write(tmp_path / "tenth.jsonl", {step: losses[step] for step in range(10, 101, 10)})
    assert align(steps, tenth, "exact").exit_code == 0
    wrong = write(tmp_path / "wrong.jsonl", {step: losses[step] * 1.1 for step in range(10, 101, 10)})
    assert align(steps, wrong).exit_code == 1
    with pytest.raises(RecordError, match=r"no step in common: they have steps 1 to 9 and 10 to 100; "):
        align_records(make({s: losses[s] for s in range(1, 10)}), read_curve(tenth), Policy("exact"))
    with pytest.raises(RecordError, match=r"steps 1 to 2 and 7 to 8$"):
        align_records(make({1: 1.0, 2: 1.0}), make({7: 1.0, 8: 1.0}), Policy("exact"))
