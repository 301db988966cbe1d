"""Comparing curves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.align.records import make, write
from xtrain import cli
from xtrain.align.compare import Policy, compare
from xtrain.base.errors import RecordError


def test_comparison_of_curves() -> None:
    reference = make({1: 2.0, 2: 1.0, 3: 0.5, 9: 0.1})
    outcome = compare(reference, make({1: 2.0, 2: 1.01, 3: 0.5}), Policy("relative", 0.02))
    assert outcome.aligned
    assert "1 step stands in one record only" in outcome.sentence()
    assert (outcome.steps, outcome.bit_identical, outcome.largest_step) == (3, 2, 2)
    assert outcome.largest == pytest.approx(0.01)
    assert outcome.mean == pytest.approx(0.01 / 3)
    parted = compare(reference, make({1: 2.0, 2: 1.05, 3: 0.9}), Policy("relative", 0.02))
    assert (parted.aligned, parted.first_outside) == (False, 2)
    assert "part at step 2" in parted.sentence()
    assert "to the last bit" in compare(reference, reference, Policy("exact")).sentence()


def test_nan_is_only_equal_to_nan() -> None:
    assert compare(make({1: math.nan}), make({1: math.nan}), Policy("exact")).aligned
    assert not compare(make({1: 1.0}), make({1: math.nan}), Policy("relative", 0.5)).aligned
    assert not compare(make({1: math.inf}), make({1: 1.0}), Policy("relative", 0.5)).aligned


def test_policies() -> None:
    for text in ("exact", "envelope", "relative:0.02", "mean:0.001"):
        assert str(Policy.parse(text)) == text
    for text in ("relative", "relative:x", "relative:-1", "relative:nan", "mean:inf", "absolute:1"):
        with pytest.raises(RecordError, match="unknown policy"):
            Policy.parse(text)
    with pytest.raises(RecordError, match="needs an envelope"):
        compare(make({1: 1.0}), make({1: 1.0}), Policy("envelope"))


def test_the_mean_policy_names_the_step_that_used_the_tolerance_up() -> None:
    reference = make(dict.fromkeys(range(1, 11), 1.0))
    candidate = make({step: 1.0 + (0.1 if step >= 5 else 0.0) for step in range(1, 11)})
    assert compare(reference, candidate, Policy("mean", 0.06 + 1e-9)).aligned
    # Ten steps may differ by 0.35 together: steps 5, 6, 7 do by 0.3, step 8 is too much.
    assert compare(reference, candidate, Policy("mean", 0.035)).first_outside == 8


_LOSSES = st.floats(min_value=1e-3, max_value=1e3)


@given(st.dictionaries(st.integers(1, 50), _LOSSES, min_size=1), st.floats(0, 1), st.data())
def test_comparing_by_hypothesis(losses: dict[int, float], tolerance: float, data: st.DataObject) -> None:
    steps = sorted(losses)
    factors = {step: data.draw(st.floats(0.5, 1.5)) for step in steps}
    reference = make({step: losses[step] for step in steps})
    candidate = make({step: losses[step] * factors[step] for step in steps})
    outcome = compare(reference, candidate, Policy("relative", tolerance))
    apart = [abs(losses[s] * factors[s] - losses[s]) / losses[s] for s in steps]
    outside = [s for s, difference in zip(steps, apart, strict=True) if difference > tolerance]
    assert outcome.first_outside == (outside[0] if outside else None)
    assert outcome.largest == pytest.approx(max(apart))
    assert outcome.mean == pytest.approx(sum(apart) / len(apart), abs=1e-12)
    assert outcome.bit_identical == sum(losses[s] * factors[s] == losses[s] for s in steps)
    assert compare(reference, reference, Policy("exact")).aligned
    exact = compare(reference, candidate, Policy("exact"))
    assert exact.aligned == all(losses[s] * factors[s] == losses[s] for s in steps)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "a.jsonl", {1: 2.0, 2: 1.0})
    two = write(tmp_path / "b.jsonl", {1: 2.0, 2: 1.1})
    picture = tmp_path / "p.png"
    assert cli.main(["align", str(one), str(one), "--policy", "exact"]) == 0
    assert cli.main(["align", str(one), str(two), "--plot", str(picture)]) == 1
    assert "part at step 2" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["align", str(one), str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["align", str(one), str(write(tmp_path / "c.jsonl", {7: 1.0}))]) == 2
    assert "no step in common" in capsys.readouterr().err
