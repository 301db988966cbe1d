"""Which module departs first: phases, order, bands; hints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.align.records import make, write
from xtrain.align.alignment import align, align_records
from xtrain.align.compare import Policy, compare
from xtrain.align.differences import header_differences
from xtrain.align.envelope import measure_records
from xtrain.align.hints import hints
from xtrain.align.module_bands import ModuleBands, measure_bands
from xtrain.align.module_table import PHASES, STATISTICS, ModuleTable
from xtrain.align.modules import compare_modules
from xtrain.align.text import junit

NAMES = [f"layers.{index}" for index in range(5)]


def _table(names: list[str] = NAMES, snapshots: int = 6, every: int = 10) -> ModuleTable:
    table = ModuleTable(list(names))
    steps = np.arange(snapshots) * every + 1
    for phase in PHASES:
        for statistic in STATISTICS:
            value = 0.0 if statistic == "nonfinite" else 2.0
            values = np.full((snapshots, len(names)), value, np.float32)
            table.put(phase, statistic, steps, values)
    return table


@given(
    st.lists(
        st.tuples(
            st.sampled_from(PHASES), st.sampled_from(STATISTICS[:3]), st.integers(0, 5), st.integers(0, 4)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_first_departure(changes: list[tuple[str, str, int, int]]) -> None:
    """Earliest snapshot, then earliest phase, then the first module of forward and the last of backward."""
    reference, candidate = _table(), _table()
    for phase, statistic, row, module in changes:
        candidate.values[phase, statistic][row, module] *= 1.5
    found = compare_modules(reference, candidate, 0.1).first
    assert found is not None
    row = min(change[2] for change in changes)
    phase = min((change[0] for change in changes if change[2] == row), key=PHASES.index)
    modules = [change[3] for change in changes if change[2] == row and change[0] == phase]
    assert (found.step, found.phase) == (10 * row + 1, phase)
    if phase == "forward":
        assert found.module == NAMES[min(modules)]
    elif phase == "backward":
        assert found.module == NAMES[max(modules)]
    else:
        assert found.module in [NAMES[module] for module in modules]
    assert compare_modules(reference, reference, 0.0).first is None
    assert compare_modules(reference, candidate, 10.0).first is None


def test_numbers_that_are_not_finite_depart_whatever_is_allowed() -> None:
    reference, candidate = _table(), _table()
    candidate.values["backward", "nonfinite"][3, 2] = 1
    found = compare_modules(reference, candidate, 100.0)
    assert found.first is not None
    assert found.sentence() == (
        "the first module that departs is layers.2, in phase backward of step 31: nonfinite of the gradient that "
        "comes back to it is 1 instead of 0"
    )


def test_models_that_differ_are_compared_where_they_overlap() -> None:
    reference, candidate = _table(), _table(["layers.4", "layers.2", "head"], snapshots=3, every=20)
    candidate.values["forward", "rms"][1, 1] = 9.0  # layers.2 at step 21
    found = compare_modules(reference, candidate, 0.1)
    assert found.names == ["layers.2", "layers.4"]
    assert found.heat["forward"][0].tolist() == [1, 21, 41]
    assert found.first is not None
    assert (found.first.module, found.first.step, found.first.reference) == ("layers.2", 21, 2.0)
    assert "3 modules stand in the reference only and 1 in the candidate only" in found.notes[0]


def test_a_module_that_did_not_run_is_not_compared() -> None:
    reference, candidate = _table(), _table()
    for statistic in STATISTICS:
        candidate.values["forward", statistic][:, 1] = np.nan
    assert compare_modules(reference, candidate, 0.0).first is None


def _noisy(draw: np.random.Generator, size: float) -> ModuleTable:
    table = _table()
    for key, values in table.values.items():
        if key[1] != "nonfinite":
            values *= 1 + size * draw.standard_normal(values.shape).astype(np.float32)
    return table


def test_bands_of_measured_runs() -> None:
    draw = np.random.default_rng(0)
    alarms = 0
    for _ in range(20):
        bands = measure_bands([_noisy(draw, 1e-3) for _ in range(6)], 0.05)
        assert bands is not None
        assert compare_modules(_table(), _table(), 0.0, bands).first is None
        alarms += compare_modules(_table(), _noisy(draw, 1e-3), 0.0, bands).first is not None
        changed = _noisy(draw, 1e-3)
        changed.values["gradient", "rms"][2, 3] *= 1.2
        first = compare_modules(_table(), changed, 0.0, bands).first
        assert first is not None
        assert first.step <= 21
    assert alarms <= 5
    again = ModuleBands.from_arrays(bands.arrays())
    assert again is not None
    assert again.names == NAMES
    assert again.factors == bands.factors
    assert all((again.scale[key] == bands.scale[key]).all() for key in bands.scale)
    assert measure_bands([_table(), _table()], 0.05) is None
    assert measure_bands([_table(), _table(), _table(["x"])], 0.05) is None


def test_an_envelope_of_other_modules_does_not_judge_these() -> None:
    draw = np.random.default_rng(0)
    curves = 2 * (1 + 1e-4 * draw.standard_normal((4, 40)))
    records = [make(dict(enumerate(curve.tolist(), 1))) for curve in curves]
    for record in records[:3]:
        record.modules = _noisy(draw, 1e-3)
        del record.modules.steps["gradient"]
    envelope = measure_records(records[:3])
    records[3].modules = _noisy(draw, 1e-3)  # with a phase that was not measured
    found = align_records(records[0], records[3], Policy("envelope"), envelope)
    assert found.modules is not None
    assert found.modules.first is None
    other = make(dict(enumerate(curves[0].tolist(), 1)))
    other.modules = _table(["x"])
    found = align_records(other, other, Policy("envelope"), envelope)
    assert found.modules is None
    assert "the envelope was not measured for these modules: they were not compared" in found.notes


STEPS = list(range(1, 41))


def _hints(reference: dict[str, Any], candidate: dict[str, Any], policy: str = "relative:0.01") -> str:
    one, two = make(**reference), make(**candidate)
    outcome = compare(one, two, Policy.parse(policy))
    assert not outcome.aligned
    return "; ".join(hints(one, two, outcome))


def _losses(departs: int | None = None, factor: float = 1.1) -> dict[int, float]:
    return {step: (2.0 + 1 / step) * (factor if departs and step >= departs else 1.0) for step in STEPS}


def _from(step: int, before: float, after: float) -> list[float]:
    return [after if at >= step else before for at in STEPS]


def test_hints() -> None:
    plain, late = {"losses": _losses()}, {"losses": _losses(20)}
    found = _hints({**plain, "loss_scale": _from(99, 1024, 0)}, {**late, "loss_scale": _from(12, 1024, 64)})
    assert "loss scale has collapsed at step 12, before the loss (64 instead of 1024)" in found
    found = _hints({**plain, "grad_norm": _from(99, 1, 1)}, {**late, "grad_norm": _from(15, 1, 3)})
    assert "gradient norm departs at step 15, before the loss" in found
    found = _hints({**plain, "lr": _from(99, 1, 1)}, {**late, "lr": _from(19, 1, 0.5)})
    assert "learning rate differs since step 19 (0.5 instead of 1)" in found
    found = _hints(
        {**plain, "applied": _from(99, 1, 1)}, {**late, "applied": [float(s != 19) for s in STEPS]}
    )
    assert "candidate alone skipped the update of step 19" in found
    found = _hints(plain, {**late, "headers": [{}, {"from_step": 18}]})
    assert "candidate was restarted at step 18" in found
    assert _hints(plain, {**late, "headers": [{}, {"from_step": 25}]}) == ""
    assert "2 times the reference's at every step" in _hints(plain, {"losses": _losses(1, 2.0)})
    jumpy = {step: loss * (1.1 if step % 2 else 0.8) for step, loss in _losses().items()}
    assert "since the first step, before any update" in _hints(plain, {"losses": jumpy})
    broken = {**_losses(), 20: float("nan")}
    assert "not finite at step 20" in _hints(plain, {"losses": broken})
    world = [{"world_size": 4}]
    ranks = {f"loss_by_rank.{rank}": _from(99, 1, 1) for rank in range(4)}
    one_rank = {**ranks, "loss_by_rank.2": _from(18, 1, 1.5)}
    found = _hints({**plain, **ranks, "headers": world}, {**late, **one_rank, "headers": world})
    assert "rank 2 departs alone at step 18 (by 5.0e-01, the others by at most 0.0e+00, and" in found


def test_no_hint_without_evidence() -> None:
    assert _hints({"losses": _losses()}, {"losses": _losses(20)}) == ""
    one = make(_losses())
    assert hints(one, one, compare(one, one, Policy("exact"))) == []


def test_differences_of_headers() -> None:
    one = {
        "type": "header",
        "started": "x",
        "config": {"lr": 0.1, "zero": {"stage": 1}},
        "torch": "2.1",
        "backend": "cpu",
    }
    two = {
        "type": "header",
        "started": "y",
        "config": {"lr": 0.1, "zero": {"stage": 3}, "new": True},
        "torch": "2.2",
    }
    found = header_differences(one, two)
    assert [difference.key for difference in found] == ["config.new", "config.zero.stage", "backend", "torch"]
    assert found[1].sentence() == "config.zero.stage: 1 in the reference, 3 in the candidate"
    assert header_differences(one, {}) == header_differences(one, one) == []


def test_gaps_are_told() -> None:
    with_gap = {step: loss for step, loss in _losses().items() if not 10 < step < 15}
    found = align_records(make(_losses()), make(with_gap), Policy("exact"))
    assert found.aligned
    assert found.left_out == ["the candidate has 1 gap: steps between 10 and 15 are missing"]
    assert found.exit_code == 2
    assert "4 steps stand in one record only and were not compared" in found.sentence()


def test_ends_that_differ_are_told() -> None:
    losses = _losses()
    early = {step: loss for step, loss in losses.items() if step <= 10}
    found = align_records(make(losses), make(early), Policy("exact"))
    last = max(losses)
    assert found.left_out == [
        f"the reference ends at step {last} and the candidate at step 10: what is between was not compared"
    ]
    assert (found.aligned, found.exit_code, replace(found, partial=True).exit_code) == (True, 2, 0)
    assert 'name="completeness"' in junit(found)
    assert 'failures="1"' in junit(found)
    assert 'failures="0"' in junit(replace(found, partial=True))
    # A tool that logs every fifth step has left out nothing that it had.
    coarse = {step: loss for step, loss in losses.items() if step % 5 == 0}
    assert align_records(make(losses), make(coarse), Policy("exact")).exit_code == 0
    # What is outside is outside, however little there is to compare.
    assert align_records(make(losses), make({**early, 10: 9.0}), Policy("exact")).exit_code == 1


def test_modules_decide_by_the_envelope() -> None:
    """Losses that agree, and one module that does not: too small for the loss, and no rounding."""
    runs = [make(_losses()) for _ in range(5)]
    draw = np.random.default_rng(0)
    for run in runs:
        run.columns["loss"] *= 1 + 1e-8 * draw.standard_normal(len(run.step))
        run.modules = _table()
    envelope = measure_records(runs[:4])
    assert envelope.bands is not None
    assert align_records(runs[0], runs[4], Policy("envelope"), envelope).exit_code == 0
    assert runs[4].modules is not None
    runs[4].modules.values["forward", "rms"][1] *= 1.001
    found = align_records(runs[0], runs[4], Policy("envelope"), envelope)
    assert found.curve is not None
    assert found.curve.aligned
    assert found.modules is not None
    assert found.modules.first is not None
    assert (found.exit_code, found.began) == (1, found.modules.first.step)
    assert "the first module that departs" in found.sentence()
    assert "a flipped bit" in found.hints[0]


@pytest.mark.parametrize("policy", ["exact", "relative:0.1", "mean:0.1"])
def test_modules_never_decide_where_there_are_losses(policy: str) -> None:
    one, two = make(_losses()), make(_losses())
    one.modules, two.modules = _table(), _table()
    two.modules.values["forward", "rms"] *= 3
    found = align_records(one, two, Policy.parse(policy))
    assert found.aligned
    assert found.modules is not None
    assert found.modules.first is not None


def test_a_record_whose_steps_are_not_in_order(tmp_path: Path) -> None:
    losses = _losses()
    whole = write(tmp_path / "whole.jsonl", losses)
    mixed = write(tmp_path / "mixed.jsonl", dict(reversed(losses.items())))
    found = align(whole, mixed, "exact")
    assert found.left_out == ["the candidate: its steps were not in order"]
    assert (found.aligned, found.exit_code, align(whole, mixed, "exact", partial=True).exit_code) == (
        True,
        2,
        0,
    )
    double = tmp_path / "double.jsonl"
    double.write_text(whole.read_text() + whole.read_text().splitlines()[-1] + "\n")
    assert align(double, whole, "exact").left_out == [
        "the reference: 1 step stands in it twice: the later line counts"
    ]
