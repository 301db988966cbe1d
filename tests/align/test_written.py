"""Numbers that other tools rounded or cut off when they wrote them: no column of theirs is a false alarm."""

from __future__ import annotations

import math
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.align.logs import table
from tests.align.records import make
from xtrain.align.alignment import align_records
from xtrain.align.compare import Policy
from xtrain.align.envelope import Envelope, measure_records
from xtrain.align.module_table import ModuleTable
from xtrain.align.record import Record
from xtrain.align.sources import read_curve
from xtrain.align.sources.common import CurveBuilder

STEPS = list(range(1, 41))
_NUMBERS = st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=40)


def _read(folder: Path, **columns: list[str]) -> Record:
    texts = {"step": [str(step) for step in range(1, len(next(iter(columns.values()))) + 1)], **columns}
    return read_curve(table(folder / "x.csv", texts))


def _decimals(value: float, digits: int, rounding: str) -> str:
    return str(Decimal(value).quantize(Decimal(1).scaleb(-digits), rounding=rounding))


@given(_NUMBERS, st.integers(1, 8), st.sampled_from(["fixed", "scientific", "significant", "cut"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_numbers_are_equal_as_far_as_they_were_written(
    tmp_path: Path, values: list[float], digits: int, how: str
) -> None:
    texts = {
        "fixed": [_decimals(value, digits, ROUND_HALF_EVEN) for value in values],
        "cut": [_decimals(value, digits, ROUND_DOWN) for value in values],
        "scientific": [f"{value:.{digits}E}" for value in values],
        "significant": [f"{value:.{digits + 1}g}" for value in values],
    }[how]
    if all("." not in text and "e" not in text.lower() for text in texts):
        return  # whole numbers tell nothing of their rounding
    original = make(dict(zip(range(1, len(values) + 1), values, strict=True)))
    for pair in ((original, _read(tmp_path, loss=texts)), (_read(tmp_path, loss=texts), original)):
        found = align_records(*pair, Policy("exact"))
        assert found.aligned, found.sentence()
        if [float(text) for text in texts] != values:
            assert "equal as far as written" in found.sentence()


def test_what_was_cut_off_is_told_and_a_departure_is_still_found(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    values = (2 + draw.standard_normal(40)).tolist()
    original = make(dict(zip(STEPS, values, strict=True)))
    cut = [_decimals(value, 4, ROUND_DOWN) for value in values]
    found = align_records(original, _read(tmp_path, loss=cut), Policy("exact"))
    assert found.exit_code == 0
    assert found.notes == [
        "the candidate: its numbers look cut off, not rounded (loss): a whole unit of the last digit is allowed"
    ]
    rounded = [_decimals(value, 4, ROUND_HALF_EVEN) for value in values]
    assert align_records(original, _read(tmp_path, loss=rounded), Policy("exact")).notes == []
    # From step 30 on the run is another one: that its numbers are cut off is seen before.
    other = [*cut[:29], *(_decimals(value + 0.01, 4, ROUND_DOWN) for value in values[29:])]
    found = align_records(original, _read(tmp_path, loss=other), Policy("exact"))
    assert (found.exit_code, found.began) == (1, 30)
    # What is off by 0.7 units in both directions is not cut off.
    signs = [value + (7e-5 if step % 2 else -7e-5) for step, value in zip(STEPS, values, strict=True)]
    wrong = [_decimals(value, 4, ROUND_HALF_EVEN) for value in signs]
    assert align_records(original, _read(tmp_path, loss=wrong), Policy("exact")).exit_code == 1


def _measured() -> tuple[Envelope, list[Record]]:
    runs = []
    for seed in range(5):
        draw = np.random.default_rng(seed)
        losses = 2 + 1 / np.array(STEPS) + 1e-7 * draw.standard_normal(40)
        norms = 3 + 1 / np.array(STEPS) + 1e-6 * draw.standard_normal(40)
        runs.append(
            make(dict(zip(STEPS, losses.tolist(), strict=True)), grad_norm=norms.tolist(), lr=_rates())
        )
    return measure_records(runs[:4]), runs


def _rates() -> list[float]:
    return [1.23456e-3 / math.sqrt(step) for step in STEPS]


def test_rounded_gradient_norms_are_within_the_envelope(tmp_path: Path) -> None:
    envelope, runs = _measured()
    losses = [f"{loss:.6E}" for loss in runs[4].loss]
    norms = [f"{norm:.3f}" for norm in runs[4].column("grad_norm")]
    found = align_records(
        runs[0], _read(tmp_path, loss=losses, grad_norm=norms), Policy("envelope"), envelope
    )
    assert found.norm is not None
    assert found.exit_code == 0, found.sentence()
    assert found.sentence().count("as far as written") == 2
    norms[20] = f"{float(norms[20]) + 0.002:.3f}"
    found = align_records(
        runs[0], _read(tmp_path, loss=losses, grad_norm=norms), Policy("envelope"), envelope
    )
    assert (found.exit_code, found.began) == (1, 21)


def test_rounded_rates_are_no_hint(tmp_path: Path) -> None:
    losses = {step: 2 + 1 / step for step in STEPS}
    departs = [repr(loss * (1.1 if step > 20 else 1)) for step, loss in losses.items()]
    for write in ("{:.3g}", "{:.2E}", "{:.6f}"):
        rates = [write.format(rate) for rate in _rates()]
        found = align_records(
            make(losses, lr=_rates()), _read(tmp_path, loss=departs, lr=rates), Policy("exact")
        )
        assert found.began == 21
        assert not any("learning rate" in hint for hint in found.hints)
        rates[4:] = [write.format(1.1 * rate) for rate in _rates()[4:]]
        found = align_records(
            make(losses, lr=_rates()), _read(tmp_path, loss=departs, lr=rates), Policy("exact")
        )
        assert any("learning rate differs since step 5" in hint for hint in found.hints)


def test_rates_that_somebody_has_set_have_all_their_digits(tmp_path: Path) -> None:
    departs = [repr(2.0 + step) for step in STEPS]
    candidate = _read(tmp_path, loss=departs, lr=["2e-05"] * 40)
    assert "lr" not in candidate.rounding
    found = align_records(make(dict.fromkeys(STEPS, 2.0), lr=[1e-5] * 40), candidate, Policy("exact"))
    assert any("learning rate differs since step 1 (2e-05 instead of 1e-05)" in hint for hint in found.hints)


def test_numbers_that_were_written_as_float32() -> None:
    """TensorBoard's events."""
    values = {step: 2 + 1 / (3 * step) for step in STEPS}
    builder = CurveBuilder(Path("x"), "TensorBoard events")
    builder.float32 = True
    for step, value in values.items():
        builder.add(step, {"train/loss": float(np.float32(value))})
    found = align_records(make(values), builder.build(None), Policy("exact"))
    assert found.exit_code == 0
    assert "all 40 steps are equal as far as written" in found.sentence()


@pytest.mark.parametrize("without", ["reference", "candidate"])
def test_a_norm_that_one_record_lacks_is_told(without: str) -> None:
    envelope, runs = _measured()
    one, two = runs[0], runs[4]
    (one if without == "reference" else two).columns.pop("grad_norm")
    found = align_records(one, two, Policy("envelope"), envelope)
    assert found.exit_code == 0
    assert found.notes == [
        f"the gradient norm, which the envelope has, was not compared: the {without} has none"
    ]


def test_rates_that_were_written_a_step_later(tmp_path: Path) -> None:
    """Some tools write the rate after the schedule's step: that is said, beside single steps and in windows."""
    losses = {step: 2 + 1 / step for step in STEPS}
    reference = make(losses, lr=_rates())
    departs = {step: loss * (1.1 if step > 20 else 1) for step, loss in losses.items()}
    later = [f"{1.23456e-3 / math.sqrt(step + 1):.6E}" for step in STEPS]
    single = _read(tmp_path, loss=[repr(loss) for loss in departs.values()], lr=later)
    windows = single.take(slice(4, None, 5))
    windows.columns["loss"] = single.loss.reshape(-1, 5).mean(axis=1)
    windows.begins = windows.step - 5
    for candidate, first in ((single, 1), (windows, 5)):
        found = align_records(reference, candidate, Policy("relative", 1e-4))
        hint = next(hint for hint in found.hints if "learning rate" in hint)
        assert f"differs since step {first} " in hint
        assert "each of the candidate's is the reference's of the next step" in hint


@pytest.mark.parametrize("has", ["reference", "candidate"])
def test_modules_that_only_one_record_has_are_told(has: str) -> None:
    envelope, runs = _measured()
    one, two = runs[0], runs[4]
    table = ModuleTable(["a"])
    table.put("forward", "rms", np.array([1]), np.ones((1, 1), np.float32))
    (one if has == "reference" else two).modules = table
    found = align_records(one, two, Policy("envelope"), envelope)
    assert found.exit_code == 0
    assert found.notes == [f"only the {has} has statistics of modules: they were not compared"]
