"""Bands where tensors are of 16 bits: the grid on which a statistic lies, factors of their own, overflow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.align.records import make
from xtrain.align.alignment import align_records
from xtrain.align.band import COARSEST, FINEST, grid_of
from xtrain.align.compare import Policy
from xtrain.align.envelope import measure_records
from xtrain.align.html import html
from xtrain.align.module_bands import measure_bands
from xtrain.align.module_table import PHASES, STATISTICS, ModuleTable
from xtrain.align.modules import compare_modules
from xtrain.align.record import Record
from xtrain.align.text import junit, markdown

NAMES = ["embedding", "attention", "mlp"]
SNAPSHOTS, RUNS = 12, 8
GRIDS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}


@given(st.sampled_from(list(GRIDS)), st.integers(0, 10**6), st.sampled_from([1.0, 2.0**-20, 2.0**15]))
def test_the_grid_of_a_dtype_is_seen_from_its_values(dtype: torch.dtype, seed: int, scale: float) -> None:
    values = torch.rand(4, 64, 2, generator=torch.Generator().manual_seed(seed)) + 0.5
    grid = grid_of(values.to(dtype).double().numpy() * scale)
    assert grid.shape == (2,)
    assert grid.tolist() == [GRIDS[dtype]] * 2


def test_grids_at_the_ends() -> None:
    assert (
        grid_of(np.zeros((3, 5))) == COARSEST
    )  # as a constant: nothing finer than bfloat16 is seen, nor coarser
    assert grid_of(np.ones((3, 5))) == COARSEST
    assert grid_of(np.full((3, 5), 1.0 + 1e-12)) == FINEST
    assert grid_of(np.array([[np.nan, np.inf, 1.5]])) == COARSEST


def _table(draw: np.random.Generator, noise: float = 1e-4) -> ModuleTable:
    """A correct run in bfloat16: averages with some noise, and one largest element, rounded."""
    table = ModuleTable(list(NAMES))
    for phase in PHASES:
        for statistic in STATISTICS:
            values = 1.3 + np.arange(SNAPSHOTS)[:, None] * 0.01 + np.arange(len(NAMES))
            values = values * (1 + noise * draw.standard_normal(values.shape))
            if statistic == "max_abs":
                values = torch.from_numpy(values).bfloat16().double().numpy()
            elif statistic == "nonfinite":
                values = np.zeros_like(values)
            table.put(phase, statistic, np.arange(SNAPSHOTS) + 1, values.astype(np.float32))
    return table


def _tables(seed: int = 0) -> list[ModuleTable]:
    draw = np.random.default_rng(seed)
    return [_table(draw) for _ in range(RUNS + 1)]


def test_a_single_step_of_the_grid_neither_departs_nor_widens() -> None:
    """Of runs whose largest element has the same bits, one lies a step away: 20,000 scales, were it float32."""
    *runs, candidate = _tables()
    key = ("forward", "max_abs")
    for run in runs:
        run.values[key][:] = runs[0].values[key]
    runs[3].values[key][5, 1] *= 1 + 2.0**-7
    bands = measure_bands(runs, 0.005)
    assert bands is not None
    assert bands.factors["max_abs"].lasting < 20
    assert all(factors.lasting < 20 for factors in bands.factors.values())
    candidate.values[key][:] = runs[0].values[key]
    candidate.values[key][8, 2] *= 1 - 2.0**-8
    assert compare_modules(runs[0], candidate, 0.0, bands).first is None


@pytest.mark.parametrize("statistic", ["mean", "abs_mean", "rms", "max_abs", "projection"])
def test_a_doubled_output_departs(statistic: str) -> None:
    """By any statistic alone."""
    *runs, candidate = _tables()
    bands = measure_bands(runs, 0.005)
    candidate.values["forward", statistic][4, 1] *= 2
    found = compare_modules(runs[0], candidate, 0.0, bands).first
    assert found is not None
    assert (found.step, found.module, found.statistic) == (5, "attention", statistic)


def test_a_statistic_that_strays_wildly_makes_the_others_no_wider() -> None:
    *runs, candidate = _tables()
    before = measure_bands(runs, 0.005)
    for index, run in enumerate(runs):
        run.values["backward", "mean"][6:, 0] *= 1 + 10.0 ** (-index)
    bands = measure_bands(runs, 0.005)
    assert before is not None
    assert bands is not None
    assert bands.factors["mean"].lasting > 40
    for statistic in ("abs_mean", "rms", "max_abs", "projection"):
        assert bands.factors[statistic].lasting < 1.5 * before.factors[statistic].lasting
    candidate.values["backward", "rms"][7, 0] *= 1.05
    assert compare_modules(runs[0], candidate, 0.0, bands).first is not None
    assert "mean " in bands.sentence()


def test_wide_bands_are_told() -> None:
    """Of modules as of losses: an envelope that is blind says so."""
    draw = np.random.default_rng(1)
    runs = []
    for index, table in enumerate(_tables()[:RUNS]):
        table.values["backward", "mean"][6:, 0] *= 1 + 10.0 ** (-index)
        run = make({step + 1: float(2 + 1e-4 * draw.standard_normal()) for step in range(SNAPSHOTS)})
        run.modules = table
        runs.append(run)
    envelope = measure_records(runs)
    assert [what for what, _ in envelope.wide()] == ["mean of modules"]
    assert "bands of 3 modules: widened" in envelope.sentence()
    found = align_records(runs[0], runs[1], Policy("envelope"), envelope)
    assert "times the measured spread in mean of modules" in " ".join(found.notes)
    for report in (markdown(found), html(found), junit(found)):
        assert "bands of 3 modules: widened" in report


def test_correct_runs_depart_as_rarely_as_it_says() -> None:
    alarms = 0
    for seed in range(60):
        *runs, candidate = _tables(seed)
        bands = measure_bands(runs, 0.05)
        alarms += compare_modules(runs[0], candidate, 0.0, bands).first is not None
    assert alarms <= 8  # 3 expected; more in 1 % of all cases


def _overflown(table: ModuleTable, row: int, count: int) -> None:
    table.values["gradient", "nonfinite"][row] = count
    for statistic in ("mean", "abs_mean", "rms", "max_abs", "projection"):
        table.values["gradient", statistic][row] = np.inf


def test_overflow_in_fp16() -> None:
    """How many elements overflow is noise; whether some do is not, unless correct runs differ in that, too."""
    *runs, candidate = _tables()
    for index, run in enumerate(runs):
        _overflown(run, 2, index + 1)
    _overflown(runs[0], 7, 3)
    bands = measure_bands(runs, 0.005)
    whole = measure_bands(_tables()[:-1], 0.005)
    assert bands is not None
    assert whole is not None
    for statistic, factors in whole.factors.items():  # the steps after an overflow are judged as before
        assert bands.factors[statistic].lasting < 2 * factors.lasting
    reference = runs[0]
    _overflown(candidate, 2, 1000)
    assert compare_modules(reference, candidate, 0.0, bands).first is None
    _overflown(candidate, 7, 77)
    assert compare_modules(reference, candidate, 0.0, bands).first is None
    assert compare_modules(candidate, candidate, 0.0).first is None
    broken = _tables()[-1]
    _overflown(broken, 2, 1)
    _overflown(broken, 9, 1)
    first = compare_modules(reference, broken, 0.0, bands).first
    assert first is not None
    assert (first.step, first.phase) == (10, "gradient")
    candidate.values["gradient", "rms"][10, 1] *= 1.5
    first = compare_modules(reference, candidate, 0.0, bands).first
    assert first is not None
    assert first.step == 11


def test_at_which_step_gradients_overflow_is_noise_if_the_step_is_skipped() -> None:
    """With a dynamic loss scale near the limit, the last bit decides."""
    *tables, other = _tables()
    draw = np.random.default_rng(0)

    def run(table: ModuleTable, skipped: int | None) -> Record:
        losses = {step + 1: float(2 + 1e-4 * draw.standard_normal()) for step in range(SNAPSHOTS)}
        norms, applied = np.full(SNAPSHOTS, 1.0) + 1e-4 * draw.standard_normal(SNAPSHOTS), np.ones(SNAPSHOTS)
        if skipped is not None:
            norms[skipped], applied[skipped] = np.inf, 0
            _overflown(table, skipped, 5)
        found = make(losses, grad_norm=norms.tolist(), applied=applied.tolist())
        found.modules = table
        return found

    runs = [run(table, None) for table in tables]
    envelope, candidate = measure_records(runs), run(other, 4)
    found = align_records(runs[0], candidate, Policy("envelope"), envelope)
    assert (found.aligned, found.exit_code) == (True, 0)
    candidate.columns["applied"][4] = 1  # it went on with them
    found = align_records(runs[0], candidate, Policy("envelope"), envelope)
    assert (found.aligned, found.began) == (False, 5)


def test_a_loss_in_bfloat16_may_be_a_step_of_its_grid_away() -> None:
    draw = np.random.default_rng(0)

    def run(change: float = 0.0) -> Any:
        exact = 3 + np.arange(40) * -0.01 + 0.002 * draw.standard_normal(40) + change
        rounded = torch.from_numpy(exact).bfloat16().double().tolist()
        return make(dict(enumerate(rounded, 1)))

    runs = [run() for _ in range(6)]
    envelope = measure_records(runs)
    assert envelope.factors.lasting < 20
    assert align_records(runs[0], run(), Policy("envelope"), envelope).aligned
    found = align_records(runs[0], run(0.2), Policy("envelope"), envelope)
    assert (found.aligned, found.began) == (False, 1)


def test_models_without_a_common_module_are_not_called_aligned() -> None:
    """As of a model inside DistributedDataParallel: its record says so, and the exit status is 2."""
    one, other = make({1: 1.0, 2: 0.9}), make({1: 1.0, 2: 0.9})
    one.modules, other.modules = _tables()[:2]
    other.modules.names = [f"module.{name}" for name in NAMES]
    found = align_records(one, other, Policy("exact"))
    assert (found.aligned, found.exit_code) == (True, 2)
    assert (
        "no module has the same name in both (the reference has embedding, the candidate module.embedding)"
        in (" ".join(found.left_out))
    )
    other.modules.names = list(NAMES)
    for phase in PHASES:
        other.modules.steps[phase] = other.modules.steps[phase] + 1000
    found = align_records(one, other, Policy("exact"))
    assert found.exit_code == 2
    assert "none of the same phase and step" in " ".join(found.left_out)
