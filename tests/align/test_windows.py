"""Losses that are means over windows of steps, beside losses of single steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.align.logs import megatron_log, table, trainer_state
from tests.align.records import make, write
from xtrain import cli
from xtrain.align.alignment import align, align_records
from xtrain.align.compare import Policy
from xtrain.align.envelope import Envelope, measure_records
from xtrain.align.record import UNKNOWN, Floats, Record
from xtrain.align.sources import read_curve
from xtrain.align.windows import Windows, first_step, match
from xtrain.base.errors import RecordError


def _losses(steps: int, seed: int = 0) -> dict[int, float]:
    """Noisy, so that no mean is any step's own value."""
    draw = np.random.default_rng(seed)
    return {step: float(2.0 + draw.standard_normal()) + 3.0 / step for step in range(1, steps + 1)}


def _windowed(losses: dict[int, float], ends: list[int], first: int = 0) -> Record:
    """Means over windows, with all digits."""
    begins = [first, *ends[:-1]]
    made = make(
        {
            end: float(np.mean([losses[step] for step in range(begin + 1, end + 1)]))
            for begin, end in zip(begins, ends, strict=True)
        }
    )
    made.begins = np.array(begins, np.int64)
    return made


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12), st.integers(0, 2**20), st.data())
def test_windows_of_random_curves_are_their_means(lengths: list[int], seed: int, data: st.DataObject) -> None:
    ends = np.cumsum(lengths).tolist()
    losses = _losses(ends[-1], seed)
    norms = list(np.random.default_rng(seed).uniform(1, 2, ends[-1]))
    single, coarse = make(losses, grad_norm=norms), _windowed(losses, ends)
    # Singles, or windows that those of the coarser one are made of.
    some = data.draw(st.sets(st.sampled_from(range(1, ends[-1] + 1))))
    finer = _windowed(losses, sorted({*some, *ends}))
    for fine in (single, finer):
        for pair in ((fine, coarse), (coarse, fine)):
            found = match(*pair)
            for record in (found.reference, found.candidate):
                assert record.step.tolist() == ends
                expected = [
                    np.mean([losses[s] for s in range(e - n + 1, e + 1)])
                    for e, n in zip(ends, lengths, strict=True)
                ]
                np.testing.assert_allclose(record.loss, expected, rtol=1e-13)
            outcome = align_records(*pair, Policy("exact"))
            assert outcome.aligned
            assert outcome.exit_code == 0
    if max(lengths) > 1:
        averaged = match(single, coarse).reference
        assert averaged.column("grad_norm").tolist() == [norms[end - 1] for end in ends]


def test_rounding_of_a_mean_is_the_mean_of_the_half_units() -> None:
    losses = _losses(8)
    fine, coarse = make(losses), _windowed(losses, [2, 8])
    fine.rounding["loss"] = np.array([0.1, 0.3, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    found = match(fine, coarse).reference
    assert found.rounding["loss"] == pytest.approx([0.2, 3.5], rel=1e-5)


@pytest.mark.parametrize("policy", ["exact", "relative:1e-6", "mean:1e-6"])
def test_a_trainer_state_beside_single_steps(tmp_path: Path, policy: str) -> None:
    losses = _losses(100)
    one = write(tmp_path / "r.jsonl", losses)
    ends = list(range(5, 101, 5))
    for name, rows in (("plain", ends), ("first", [1, *ends])):  # logging_first_step
        two = trainer_state(tmp_path / f"{name}.json", losses, rows, 5)
        for pair in ((one, two), (two, one)):
            found = align(*pair, policy)
            assert found.exit_code == 0, found.left_out
            assert found.curve is not None
            assert found.curve.step.tolist() == rows
            assert "equal as far as written" in found.sentence()
            said = "; ".join(found.notes)
            assert "are averaged over the windows of 5 steps" in said
    worse = {**losses, 42: losses[42] + 1}
    found = align(
        write(tmp_path / "w.jsonl", worse), two, policy if policy != "mean:1e-6" else "relative:0.02"
    )
    assert (found.exit_code, found.began) == (1, 45)
    # A run that ends early is told, as ever.
    short = write(tmp_path / "s.jsonl", {step: loss for step, loss in losses.items() if step <= 60})
    found = align(short, two, "exact")
    assert (found.aligned, found.exit_code) == (True, 2)
    assert "the reference ends at step 60 and the candidate at step 100" in found.left_out[0]


def test_files_with_the_same_windows_are_compared_as_they_are(tmp_path: Path) -> None:
    losses = _losses(40)
    one = trainer_state(tmp_path / "a.json", losses, [10, 20, 30, 40], 10)
    two = megatron_log(tmp_path / "b.log", losses, 10)
    found = align(one, two, "exact")
    assert found.exit_code == 0
    assert not any("averaged" in note for note in found.notes)
    # Fives make up the tens.
    finer = trainer_state(tmp_path / "c.json", losses, list(range(5, 41, 5)), 5)
    found = align(finer, two, "exact")
    assert found.exit_code == 0
    assert "the losses of the reference are averaged over the windows of 10 steps" in "; ".join(found.notes)


def test_windows_of_which_larger_ones_can_be_made() -> None:
    losses = _losses(24)
    fours, sixes = _windowed(losses, list(range(4, 25, 4))), _windowed(losses, list(range(6, 25, 6)))
    found = align_records(fours, sixes, Policy("exact"))
    assert found.exit_code == 0
    assert found.curve is not None
    assert found.curve.step.tolist() == [12, 24]
    said = "the losses of the reference and the candidate are averaged over the windows of 12 steps that can be made"
    assert any(note.startswith(said) for note in found.notes)


def test_windows_that_cannot_be_matched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = _losses(60)
    windows = trainer_state(tmp_path / "a.json", losses, [10, 20, 30], 10)
    every = table(
        tmp_path / "b.csv",
        {"step": [str(s) for s in range(10, 61, 10)], "loss": [repr(losses[s]) for s in range(10, 61, 10)]},
    )
    with pytest.raises(
        RecordError, match=r"windows of 10 steps .*losses of single steps, 10 apart: no window can be"
    ):
        align(windows, every)
    assert cli.main(["align", str(windows), str(every)]) == 2
    assert "log every step in one of the two" in capsys.readouterr().err
    overlapping = _windowed(losses, [15, 25, 35], first=5)
    with pytest.raises(RecordError, match="no window can be made of both"):
        align_records(read_curve(windows), overlapping, Policy("exact"))
    assert "\n" not in capsys.readouterr().err


def test_a_log_that_begins_in_the_middle(tmp_path: Path) -> None:
    """Nobody knows over how many steps its first line is: it is left out, and what is before is told."""
    losses = _losses(60)
    path = megatron_log(tmp_path / "b.log", losses, 10)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], *lines[3:]]) + "\n")  # from iteration 30 on
    record = read_curve(path)
    assert record.begins is not None
    assert record.begins.tolist() == [UNKNOWN, 30, 40, 50]
    assert first_step(record) == 30
    found = align(write(tmp_path / "r.jsonl", losses), path, "exact")
    assert found.curve is not None
    assert found.curve.step.tolist() == [40, 50, 60]
    assert (found.aligned, found.exit_code) == (True, 2)
    assert "begins at step 1 and the candidate at step 30" in found.left_out[0]
    # Beside a whole log the same line is left out; two such logs agree about it.
    whole = megatron_log(tmp_path / "c.log", losses, 10)
    assert "step 30 was not compared" in "; ".join(align(whole, path, "exact").notes)
    assert align(path, path, "exact").exit_code == 0


def test_a_line_of_another_start_within_a_window_is_passed_over() -> None:
    losses = _losses(40)
    coarse = _windowed(losses, [10, 20, 25, 30, 40])
    assert coarse.begins is not None
    coarse.begins[2:4] = UNKNOWN, 20  # what a run that started after step 20 has left, with another interval
    for pair in ((make(losses), coarse), (coarse, make(losses))):
        coarse.columns["loss"][3] = np.mean([losses[step] for step in range(21, 31)])
        found = align_records(*pair, Policy("exact"))
        assert found.aligned
        assert found.curve is not None
        assert found.curve.step.tolist() == [10, 20, 30, 40]


def test_skipped_iterations_are_left_out_of_megatrons_means(tmp_path: Path) -> None:
    losses = _losses(50)
    two = megatron_log(tmp_path / "b.log", losses, 10, skipped=lambda step: step in (13, 14))
    found = align(write(tmp_path / "r.jsonl", losses), two, "exact")
    assert found.aligned
    assert found.curve is not None
    assert found.curve.step.tolist() == [10, 30, 40, 50]
    assert found.left_out == ["1 window was not compared: one of the files lacks steps of it"]


def test_steps_that_the_finer_one_lacks(tmp_path: Path) -> None:
    losses = _losses(50)
    gap = {step: loss for step, loss in losses.items() if step not in (20, 21)}
    two = megatron_log(tmp_path / "b.log", losses, 10)
    found = align(write(tmp_path / "r.jsonl", gap), two, "exact")
    assert found.aligned
    assert found.curve is not None
    assert found.curve.step.tolist() == [10, 40, 50]
    assert found.exit_code == 2


def test_single_lines_of_megatron_are_single_steps(tmp_path: Path) -> None:
    losses = _losses(20)
    assert read_curve(megatron_log(tmp_path / "a.log", losses, 1)).begins is None
    resumed = read_curve(megatron_log(tmp_path / "b.log", losses, 1, first=10))
    assert resumed.begins is None
    assert resumed.notes == ["its loss is column 'lm loss'"]


def test_values_that_are_not_finite_stay_so() -> None:
    losses = {**_losses(20), 7: float("nan")}
    coarse = _windowed(_losses(20), [5, 10, 15, 20])
    found = align_records(coarse, make(losses), Policy("relative", 0.5))
    assert (found.exit_code, found.began) == (1, 10)
    assert "not finite at step 10" in found.hints[0]


def test_means_that_a_file_does_not_tell_of_are_a_hint(tmp_path: Path) -> None:
    """Events or a table of a trainer that logs means: the verdict stays, and the hint says what it may be."""
    losses = _losses(60)
    ends = list(range(10, 61, 10))
    means = [f"{np.mean([losses[step] for step in range(end - 9, end + 1)]):.4f}" for end in ends]
    path = table(tmp_path / "x.csv", {"step": list(map(str, ends)), "train/loss": means})
    one = write(tmp_path / "r.jsonl", losses)
    for pair, name in (((one, path), "candidate"), ((path, one), "reference")):
        found = align(*pair)
        assert found.exit_code == 1
        assert any(
            f"agree if the losses of the {name} are means over 10 steps each" in hint for hint in found.hints
        )
    single = {end: losses[end] * 1.2 for end in ends}
    assert not any("means" in hint for hint in align(one, write(tmp_path / "s.jsonl", single)).hints)


def test_a_file_that_does_not_tell_beside_one_that_does(tmp_path: Path) -> None:
    """A trainer's state, and the events or a table of the same trainer."""
    losses = _losses(60)
    ends = list(range(10, 61, 10))
    state = trainer_state(tmp_path / "a.json", losses, ends, 10)
    texts = [repr(loss) for loss in read_curve(state).loss.tolist()]
    same = table(tmp_path / "x.csv", {"step": list(map(str, ends)), "train/loss": texts})
    found = align(state, same, "exact")
    assert found.exit_code == 0
    assert any(
        note.startswith("the candidate does not say whether its losses are means") for note in found.notes
    )
    assert align(same, state, "exact").exit_code == 0
    other = table(
        tmp_path / "y.csv", {"step": list(map(str, ends)), "train/loss": [*texts[:3], "9.5", "9.5", "9.5"]}
    )
    with pytest.raises(RecordError, match="no window can be made of both"):
        align(state, other)


def test_a_mean_over_an_epoch_that_is_longer_than_the_logging_steps(tmp_path: Path) -> None:
    losses = _losses(111)
    record = read_curve(trainer_state(tmp_path / "a.json", losses, [37, 74, 111], 10))
    assert record.begins is not None
    assert record.begins.tolist() == [0, 37, 74]
    assert record.notes == ["its losses are means over 37 steps"]


# ---------------------------------------------------------------- the envelope


def _runs(count: int, steps: int = 120) -> list[Record]:
    """Runs that differ by a millionth, with gradient norms."""
    base = np.array(list(_losses(steps).values()))
    made = []
    for seed in range(count):
        draw = np.random.default_rng(seed)
        values: Floats = base * (1 + 1e-6 * draw.standard_normal(steps))
        norms = 1.0 + 0.1 * base * (1 + 1e-5 * draw.standard_normal(steps))
        made.append(
            make(dict(zip(range(1, steps + 1), values.tolist(), strict=True)), grad_norm=norms.tolist())
        )
    return made


def test_an_envelope_over_windows_is_that_of_the_means() -> None:
    runs = _runs(5)
    envelope = measure_records(runs)
    ends = np.arange(10, 121, 10)
    averaged = envelope.over_windows(ends - 10, ends)
    assert averaged is not None
    means = np.stack([run.loss.reshape(-1, 10).mean(axis=1) for run in runs])
    assert averaged.norms is not None
    assert envelope.norms is not None
    np.testing.assert_allclose(averaged.curves, means, rtol=1e-14)
    np.testing.assert_array_equal(averaged.norms, envelope.norms[:, 9::10])
    again = Envelope.measure(ends, averaged.curves, 0.01, averaged.norms)
    assert averaged.factors == again.factors
    np.testing.assert_array_equal(averaged.limit["loss"], again.limit["loss"])
    # Windows that reach beyond what was measured are left out; without any window of several there is none.
    assert [*envelope.over_windows(ends, ends + 10).step] == [*ends[1:]]  # type: ignore[union-attr]
    assert envelope.over_windows(ends + 500, ends + 510) is None
    assert envelope.over_windows(ends - 1, ends) is None


def test_a_windowed_candidate_is_judged_by_the_averaged_envelope() -> None:
    *measured, further = _runs(7)
    envelope = measure_records(measured)
    ends = list(range(10, 121, 10))
    losses = further.losses()
    found = align_records(measured[0], _windowed(losses, ends), Policy("envelope"), envelope)
    assert found.exit_code == 0, found.sentence()
    assert found.envelope is not None
    assert found.envelope.step.tolist() == ends
    assert any(
        "gradient norm, which the envelope has, was not compared: the candidate" in n for n in found.notes
    )
    broken = {step: loss * (1.0 + 1e-3 * (step > 64)) for step, loss in losses.items()}
    found = align_records(measured[0], _windowed(broken, ends), Policy("envelope"), envelope)
    assert (found.exit_code, found.began) == (1, 70)
    # Reference and candidate with the same windows, and an envelope of single steps.
    same = align_records(
        _windowed(measured[0].losses(), ends), _windowed(losses, ends), Policy("envelope"), envelope
    )
    assert same.exit_code == 0
    sparse = Envelope.measure(envelope.step[::3], envelope.curves[:, ::3])
    with pytest.raises(RecordError, match="lacks steps of the windows of 10 steps"):
        align_records(measured[0], _windowed(losses, ends), Policy("envelope"), sparse)


def test_windows_are_described() -> None:
    assert Windows(np.array([0, 5, 10]), np.array([5, 10, 15])).length == 5
