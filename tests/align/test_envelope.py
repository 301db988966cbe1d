"""The statistical model: closed forms, and its false-alarm rate by simulation and by leaving runs out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.align.records import make, write
from xtrain import cli
from xtrain.align.alignment import align_records
from xtrain.align.band import (
    FLOOR,
    MAJORITY,
    MODULE_FLOOR,
    NORM_FLOOR,
    RESOLUTION,
    WINDOW,
    Band,
    chi_square_median,
    floors,
    persists,
    smooth_scale,
    strays,
    widening,
)
from xtrain.align.compare import Policy
from xtrain.align.envelope import Envelope, measure_records, read_envelope
from xtrain.align.html import html
from xtrain.align.record import Floats, Record
from xtrain.align.student import probability, quantile
from xtrain.align.text import junit, markdown
from xtrain.base.errors import RecordError

STEPS = 120


def _run(draw: np.random.Generator, steps: int = STEPS) -> Floats:
    """A falling curve whose deviations grow by e every 8 steps up to one percent, and are correlated."""
    step = np.arange(steps)
    scale = np.minimum(1e-6 * np.exp(step / 8), 0.01)
    slow = np.zeros(steps)
    for i in range(1, steps):
        slow[i] = 0.9 * slow[i - 1] + draw.standard_normal() * math.sqrt(1 - 0.81)
    noise = math.sqrt(0.5) * (slow + draw.standard_normal(steps))
    return np.asarray((3 * np.exp(-step / 80) + 1) * (1 + scale * noise))


def _bursts(draw: np.random.Generator, steps: int = STEPS) -> Floats:
    """A curve that deviates by rounding, but for bursts whose size differs from run to run, and leaves a trace."""
    deviation = 3e-8 * draw.standard_normal(steps)
    size = np.exp(draw.normal(0.0, 0.7))
    for step, burst in ((50, 1e-6), (80, 1e-5), (100, 3e-5)):
        deviation[step] += burst * size * draw.standard_normal()
        deviation[step + 1 :] += 0.05 * burst * size * draw.standard_normal(steps - step - 1)
    return np.asarray((3 * np.exp(-np.arange(steps) / 80) + 1) * (1 + deviation))


def _runs(count: int, seed: int) -> Floats:
    draw = np.random.default_rng(seed)
    return np.stack([_run(draw) for _ in range(count)])


def test_quantiles_of_student() -> None:
    """Values of the usual tables, and the closed forms for one and two degrees of freedom."""
    table = (
        (0.99, 1, 31.82052),
        (0.99, 4, 3.746947),
        (0.975, 10, 2.228139),
        (0.999, 2, 22.32712),
        (0.95, 30, 1.697261),
    )
    for p, freedom, t in table:
        assert quantile(p, freedom) == pytest.approx(t, rel=1e-5)
    for t in (0.3, 2.0, 9.0):
        assert probability(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi)
        assert probability(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)))


def test_medians_of_chi_square_by_sampling() -> None:
    draw = np.random.default_rng(0)
    for freedom in (1, 2, 4, 7):
        sample = np.median(draw.chisquare(freedom, 200_000)) / freedom
        assert chi_square_median(freedom) == pytest.approx(sample, rel=0.01)


def test_a_constant_variance_gives_its_root_over_the_median() -> None:
    scale = smooth_scale(np.full(50, 4.0), 2)
    assert scale == pytest.approx(2 / math.sqrt(math.log(2)))
    assert smooth_scale(np.zeros(50), 2) == pytest.approx(RESOLUTION * FLOOR)


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60), st.integers(1, 12))
def test_the_scale_never_shrinks_but_after_a_spike(variance: list[float], half_window: int) -> None:
    values = np.array(variance)
    scale = smooth_scale(values, 3, half_window)
    n, h = len(values), min(half_window, (len(values) - 1) // 2)
    largest = 0.0
    for row in range(n):  # the definition, step by step
        reach = min(h, row, n - 1 - row)
        median = np.median(values[row - reach : row + reach + 1])
        largest = max(largest, math.sqrt(median / chi_square_median(3)))
        assert scale[row] == pytest.approx(max(largest, math.sqrt(values[row]), RESOLUTION * FLOOR))


def test_two_runs_by_hand() -> None:
    """Losses 1 and 1.02: mean 1.01, variance of deviations 2 * (0.01 / 1.01)**2 over one degree of freedom."""
    envelope = Envelope.measure(np.arange(3), np.array([[1.0] * 3, [1.02] * 3]))
    deviation = math.sqrt(2) * 0.01 / 1.01 / math.sqrt(0.454936423119573)
    assert envelope.centre["loss"].tolist() == pytest.approx([1.01] * 3)
    assert envelope.limit["loss"] == pytest.approx(10 * math.sqrt(1.5) * deviation)
    assert envelope.false_alarms is None
    assert "no false-alarm rate" in envelope.sentence()


def test_the_widening_is_a_prediction_bound() -> None:
    """Of log-normal strays, a further one is beyond the bound as often as was asked for."""
    draw = np.random.default_rng(1)
    for k in (3, 5, 9):
        beyond = 0
        for _ in range(4000):
            sample = np.exp(1.0 + 0.3 * draw.standard_normal(k + 1))
            beyond += sample[k] > widening(sample[:k], 0.05)
        assert beyond / 4000 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)


@pytest.mark.parametrize("run", [_run, _bursts])
def test_false_alarms_by_simulation(run: Callable[[np.random.Generator], Floats]) -> None:
    """Further correct runs against envelopes of five: the stated rate, and not by allowing everything."""
    alarms = trials = 0
    draw = np.random.default_rng(2)
    for _ in range(60):
        curves = np.stack([run(draw) for _ in range(5)])
        envelope = Envelope.measure(np.arange(STEPS), curves, false_alarms=0.05)
        for _ in range(5):
            trials += 1
            alarms += bool(envelope.outside(run(draw)).any())
        off = run(draw)
        off[60:] *= 1.05
        assert envelope.outside(off)[60:63].any()
    # Trials against one envelope are dependent: the bound is generous.
    assert alarms / trials <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 60)


@pytest.mark.parametrize("size", [1e-8, 3e-7, 1e-6])
def test_false_alarms_where_only_rounding_is_left(size: float) -> None:
    """Deviations around the floor, where scales are what the floor says."""
    draw = np.random.default_rng(3)
    alarms = 0
    for _ in range(60):
        curves = 2 * (1 + size * draw.standard_normal((10, 30)))
        envelope = Envelope.measure(np.arange(30), curves[:5], 0.05)
        alarms += sum(bool(envelope.outside(curve).any()) for curve in curves[5:])
        assert envelope.limit["loss"].min() >= FLOOR
        assert envelope.limit["loss"].max() <= max(FLOOR, 100 * size)
    assert alarms / 300 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 60)


def test_leaving_one_out() -> None:
    outside = [
        Envelope.measure(np.arange(STEPS), _runs(6, seed), 0.05).leave_one_out() or 0 for seed in range(12)
    ]
    assert sum(outside) / (6 * 12) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 72)
    odd = _runs(6, 0)
    odd[3, 40:] *= 1.2
    found = Envelope.measure(np.arange(STEPS), odd).leave_one_out()
    assert found is not None
    assert found >= 1
    assert Envelope.measure(np.arange(STEPS), _runs(3, 0)).leave_one_out() is None


def test_strays_are_measured_against_the_others() -> None:
    curves = _runs(4, 0)
    band = Band.of(curves[1:])
    deviation = np.abs(curves[0] / band.centre - 1)
    beyond = deviation > FLOOR  # what the floor allows is no stray
    assert 0 < beyond.sum() < STEPS
    excess = np.where(beyond, deviation / band.scale, 0.0)
    once, lasting = strays(curves)
    assert once[0] == pytest.approx(excess.max())
    by_hand = max(sorted(excess[row : row + WINDOW])[MAJORITY - 1] for row in range(STEPS - WINDOW + 1))
    assert lasting[0] == pytest.approx(by_hand)
    assert (lasting <= once).all()


@given(st.lists(st.booleans(), max_size=30))
def test_what_persists(beyond: list[bool]) -> None:
    """The definition, step by step."""
    found = persists(np.array(beyond, bool))
    windows = range(len(beyond) - WINDOW + 1)
    for step, there in enumerate(beyond):
        many = any(
            sum(beyond[row : row + WINDOW]) >= MAJORITY for row in windows if row <= step < row + WINDOW
        )
        assert found[step] == (there and many)


def test_a_burst_of_one_run_does_not_widen_what_may_last() -> None:
    """One of eight runs jumps once by ten thousand times the rounding: a lasting departure is still seen, and another
    such jump is not called one."""
    draw = np.random.default_rng(0)
    curves = 2.0 * (1 + 1e-6 * draw.standard_normal((8, 60)))
    curves[3, 30] *= 1.01
    envelope = Envelope.measure(np.arange(60), curves)
    assert envelope.factors.lasting < 10
    assert envelope.factors.once > 100
    further = 2.0 * (1 + 1e-6 * draw.standard_normal(60))
    further[40] *= 1.005
    assert not envelope.outside(further).any()
    further[40:] *= 1 + 5e-5
    assert 40 - WINDOW < int(np.argmax(envelope.outside(further))) <= 40
    assert envelope.outside(further)[40:].all()


def test_larger_perturbations_have_larger_floors() -> None:
    assert floors(0.0) == (FLOOR, NORM_FLOOR, MODULE_FLOOR)
    assert floors(5e-4) == (2.5e-4, 2e-3, 2e-3)
    runs = _records(4, 0)
    assert measure_records(runs).size is None
    for run, told in zip(runs, ("1", "2:0.0005", "3:0.0005", "4"), strict=True):
        run.headers = [{"environment": {"variables": {"XTRAIN_PERTURB": told}}}]
    envelope = measure_records(runs)
    assert envelope.size == 5e-4
    assert envelope.limit["loss"].min() == pytest.approx(2.5e-4)
    assert "perturbed by 0.0005" in envelope.sentence()


def test_what_the_floor_allows_is_allowed() -> None:
    """Runs that are almost the same: one more is inside up to the floor, and outside beyond it."""
    curves = np.stack([np.full(30, 2.0) * (1 + k * 1e-9) for k in range(4)])
    envelope = Envelope.measure(np.arange(30), curves, norms=curves)
    for name, floor in (("loss", FLOOR), ("grad_norm", NORM_FLOOR)):
        assert envelope.limit[name] == pytest.approx(floor)
        assert not envelope.outside(np.full(30, 2.0 * (1 + 0.9 * floor)), name).any()
        assert envelope.outside(np.full(30, 2.0 * (1 + 1.1 * floor)), name).all()


def _records(count: int, seed: int) -> list[Record]:
    return [make(dict(enumerate(curve.tolist(), 1))) for curve in _runs(count, seed)]


def test_runs_that_cannot_be_measured() -> None:
    one, two, three = _records(3, 0)
    with pytest.raises(RecordError, match="two runs at least"):
        measure_records([one])
    with pytest.raises(RecordError, match="same to the last bit"):
        measure_records([one, two, one])
    with pytest.raises(RecordError, match="no step in common"):
        measure_records([one, make({500: 1.0})])
    three.columns["loss"][7] = math.nan
    with pytest.raises(RecordError, match="no finite loss at step 8"):
        measure_records([one, two, three])


def test_steps_beyond_the_envelope_are_not_judged() -> None:
    envelope = measure_records(_records(5, 0))
    (reference,) = _records(1, 9)
    longer = {**reference.losses(), STEPS + 1: 1.0}
    policy = Policy("envelope")
    found = align_records(make(longer), make({**longer, STEPS + 1: 2.0}), policy, envelope)
    assert found.aligned
    assert "does not cover 1 of the steps" in " ".join(found.left_out)
    assert found.exit_code == 2
    assert not align_records(make(longer), make({**longer, STEPS + 1: math.nan}), policy, envelope).aligned
    with pytest.raises(RecordError, match="none of those of the records"):
        align_records(make({999: 1.0}), make({999: 1.0}), policy, envelope)


def test_gradient_norms_are_judged_too() -> None:
    runs = _records(6, 0)
    for run, norms in zip(runs, _runs(6, 1), strict=True):
        run.columns["grad_norm"] = norms
    envelope = measure_records(runs[:5])
    policy = Policy("envelope")
    assert align_records(runs[0], runs[5], policy, envelope).aligned
    right = runs[5].columns["grad_norm"].copy()
    runs[5].columns["grad_norm"][39:] *= 1.5
    found = align_records(runs[0], runs[5], policy, envelope)
    assert found.curve is not None
    assert found.curve.aligned
    assert (found.aligned, found.exit_code, found.began) == (False, 1, 40)
    assert "the gradient norms part at step 40" in found.sentence()
    assert "departs at step 40, and the loss does not" in " ".join(found.hints)
    assert 'name="gradient norm"' in junit(found)
    assert "gradient norm" in html(found)
    assert "first step outside, gradient norm" in markdown(found)
    runs[5].columns["grad_norm"] = 2 * right
    assert "is 2 times the reference's since the first step" in " ".join(
        align_records(runs[0], runs[5], policy, envelope).hints
    )
    # A step without a norm is not judged, nor is a run without norms, nor is a norm by another policy.
    runs[5].columns["grad_norm"] = np.where(np.arange(STEPS) == 10, np.nan, right)
    assert align_records(runs[0], runs[5], policy, envelope).aligned
    del runs[5].columns["grad_norm"]
    assert align_records(runs[0], runs[5], policy, envelope).norm is None
    runs[5].columns["grad_norm"] = 2 * right
    assert align_records(runs[0], runs[5], Policy("relative", 0.5)).norm is None
    del runs[1].columns["grad_norm"]
    assert measure_records(runs[:5]).norms is None


def test_a_norm_that_overflows_in_a_correct_run_is_not_judged_there_and_is_elsewhere() -> None:
    runs = _records(6, 0)
    for run, norms in zip(runs, _runs(6, 1), strict=True):
        run.columns["grad_norm"] = norms
    whole = measure_records(runs[:5])
    runs[1].columns["grad_norm"][3] = np.inf
    envelope = measure_records(runs[:5])
    assert envelope.factors.lasting == pytest.approx(whole.factors.lasting, rel=0.2)
    far = np.arange(STEPS) > 10
    np.testing.assert_allclose(envelope.limit["grad_norm"][far], whole.limit["grad_norm"][far], rtol=0.2)
    for step, change, aligned in ((3, np.inf, True), (3, 1.5, True), (4, np.inf, False), (39, 1.5, False)):
        candidate = make(runs[5].losses(), grad_norm=runs[5].columns["grad_norm"].tolist())
        candidate.columns["grad_norm"][step : step + 1 if change == np.inf or step == 3 else STEPS] *= change
        assert align_records(runs[0], candidate, Policy("envelope"), envelope).aligned is aligned


def test_saved_and_read(tmp_path: Path) -> None:
    runs = _records(4, 0)
    for run, norms in zip(runs, _runs(4, 1), strict=True):
        run.columns["grad_norm"] = norms
    envelope = measure_records(runs, size=0.0)
    envelope.save(tmp_path / "e.npz")
    again = read_envelope(tmp_path / "e.npz")
    assert again.norms is not None
    for name in ("loss", "grad_norm"):
        assert again.limit[name].tolist() == envelope.limit[name].tolist()
    assert again.sentence() == envelope.sentence()
    for content in (b"", b"rubbish", (tmp_path / "e.npz").read_bytes()[:200]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(RecordError, match="is not an envelope"):
            read_envelope(tmp_path / "bad.npz")
    with pytest.raises(RecordError, match="does not exist"):
        read_envelope(tmp_path / "none.npz")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        str(write(tmp_path / f"{index}.jsonl", dict(enumerate(curve.tolist(), 1))))
        for index, curve in enumerate(_runs(6, 4))
    ]
    output = str(tmp_path / "envelope.npz")
    assert cli.main(["align", "envelope", *paths[:5], "-o", output]) == 0
    said = capsys.readouterr().out
    assert "envelope of 5 runs" in said
    assert "leaving each run out" in said
    assert cli.main(["align", paths[0], paths[5], "--policy", "envelope"]) == 0  # found beside the reference
    for arguments, said in (
        (["envelope", *paths[:2]], "needs -o"),
        (["envelope", "-o", output, "--runs", "1", "--", "x"], "2 runs at least"),
        (["envelope", "-o", output, "--runs", "3"], "give recorded runs"),
        (["envelope", "-o", "x.json", *paths], "a .npz file"),
        ([*paths[:2], "--runs", "3"], "for `xtrain align envelope` only"),
        ([*paths[:2], "--false-alarms", "0.1"], "for `xtrain align envelope` only"),
        ([*paths[:2], "--", "x"], "for `xtrain align envelope` and --bisect only"),
        ([*paths[:2], "-o", "x"], "for `xtrain align envelope` and --bisect only"),
        ([*paths[:3]], "was given 3"),
        ([*paths[:2], "--policy", "envelope", "--envelope", paths[0]], "is not an envelope"),
    ):
        assert cli.main(["align", *arguments]) == 2, arguments
        assert said in capsys.readouterr().err
