"""The pytest plug-in: what it stores, what it refuses, and what it says. Used in earnest in test_curves.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.align.records import make, write
from xtrain.align.envelope import measure_records

pytest_plugins = ["pytester"]

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, tmp_path: Path) -> Run:
    """`run(test, *options, NAME=PATH)`: pytest on a file with that text, with environment variables."""

    def run(text: str, *options: str, **variables: Path) -> pytest.RunResult:
        pytester.makepyfile("import os\n\n" + text)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            # Registered already where xtrain is installed with its entry points.
            return pytester.runpytest("-p", "xtrain.align.pytest_plugin", "-q", *options)

    return run


CURVE = """
def test_curve(xtrain_align):
    xtrain_align(os.environ["CANDIDATE"], "references/curve.jsonl", policy="relative:0.001")
"""


def test_comparing_and_storing(run: Run, pytester: pytest.Pytester, tmp_path: Path) -> None:
    first = write(tmp_path / "first.jsonl", {1: 2.0, 2: 1.0})
    same = write(tmp_path / "same.jsonl", {1: 2.0, 2: 1.0001})
    other = write(tmp_path / "other.jsonl", {1: 2.0, 2: 1.5})
    none, stored = tmp_path / "none", pytester.path / "references" / "curve.jsonl"
    missing = run(CURVE, CANDIDATE=first)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*there is no reference*--update-reference*"])
    run(CURVE, "--update-reference", CANDIDATE=first).assert_outcomes(passed=1)
    run(CURVE, CANDIDATE=same).assert_outcomes(passed=1)
    parted = run(CURVE, CANDIDATE=other)
    parted.assert_outcomes(failed=1)
    parted.stdout.fnmatch_lines(["*# Loss curves: not aligned*", "*part at step 2*"])
    run(CURVE, "--update-reference", CANDIDATE=none).assert_outcomes(failed=1)
    run(CURVE, CANDIDATE=none).assert_outcomes(failed=1)
    assert stored.read_bytes() == first.read_bytes()
    run(CURVE, "--update-reference", CANDIDATE=other).assert_outcomes(passed=1)
    run(CURVE, CANDIDATE=other).assert_outcomes(passed=1)
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]
    stored.write_text("rubbish")
    damaged = run(CURVE, CANDIDATE=other)
    damaged.assert_outcomes(failed=1)
    damaged.stdout.fnmatch_lines([f"*{stored}*"])
    run(CURVE, "--update-reference", CANDIDATE=other).assert_outcomes(passed=1)
    assert stored.read_bytes() == other.read_bytes()


def test_a_candidate_that_stopped_early_fails(run: Run, tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl", dict.fromkeys(range(1, 9), 2.0))
    short = write(tmp_path / "short.jsonl", dict.fromkeys(range(1, 6), 2.0))
    run(CURVE, "--update-reference", CANDIDATE=whole).assert_outcomes(passed=1)
    outcome = run(CURVE, CANDIDATE=short)
    outcome.assert_outcomes(failed=1)
    outcome.stdout.fnmatch_lines(["*the reference ends at step 8 and the candidate at step 5*steps=5*"])
    for steps, passed in ((5, 1), (6, 0)):
        text = CURVE.replace("policy=", f"steps={steps}, policy=")
        run(text, CANDIDATE=short).assert_outcomes(passed=passed, failed=1 - passed)


TWO = """
def test_first(xtrain_align):
    xtrain_align(os.environ["ONE"], "curve.jsonl")

def test_second(xtrain_align):
    xtrain_align(os.environ["TWO"], "curve.jsonl")
"""


def test_of_two_candidates_one_is_stored(run: Run, pytester: pytest.Pytester, tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", {1: 2.0})
    two = write(tmp_path / "two.jsonl", {1: 1.0})
    outcome = run(TWO, "--update-reference", ONE=one, TWO=two)
    outcome.assert_outcomes(passed=1, failed=1)
    outcome.stdout.fnmatch_lines(["*was stored by *::test_first*pass update=False*"])
    assert (pytester.path / "curve.jsonl").read_bytes() == one.read_bytes()
    # One that is not to be stored is compared with what was.
    text = TWO.replace('os.environ["TWO"], "curve.jsonl"', 'os.environ["TWO"], "curve.jsonl", update=False')
    run(text, "--update-reference", ONE=one, TWO=one).assert_outcomes(passed=2)
    run(text, "--update-reference", ONE=one, TWO=two).assert_outcomes(passed=1, failed=1)


ENVELOPE = """
def test_curve(xtrain_align):
    xtrain_align(os.environ["CANDIDATE"], "curve.jsonl", policy="envelope", envelope="measured.npz")
"""


def test_an_envelope_that_is_anothers_is_told(run: Run, pytester: pytest.Pytester, tmp_path: Path) -> None:
    inside = write(tmp_path / "inside.jsonl", {1: 2.0, 2: 1.0})
    outside = write(tmp_path / "outside.jsonl", {1: 2.0, 2: 1.5})
    without = run(ENVELOPE, "--update-reference", CANDIDATE=inside)
    without.assert_outcomes(passed=1, warnings=1)
    without.stdout.fnmatch_lines(["*has no envelope*measure *measured.npz anew*"])
    runs = [make({1: 2.0 + shift, 2: 1.0 - shift}) for shift in (0.0, 1e-6, 2e-6, 3e-6)]
    measure_records(runs).save(pytester.path / "measured.npz")
    run(ENVELOPE, "--update-reference", CANDIDATE=inside).assert_outcomes(passed=1, warnings=0)
    run(ENVELOPE, CANDIDATE=inside).assert_outcomes(passed=1)
    run(ENVELOPE, CANDIDATE=outside).assert_outcomes(failed=1)
    stale = run(ENVELOPE, "--update-reference", CANDIDATE=outside)
    stale.assert_outcomes(passed=1, warnings=1)
    stale.stdout.fnmatch_lines(["*its envelope is another's*part at step 2*"])
