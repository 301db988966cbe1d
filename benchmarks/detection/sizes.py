"""How far held-out defects move the plain loss curve, beside correct variants of the same precision.

    python -m benchmarks.detection.sizes                # defects and a few correct variants, whole runs
    python -m benchmarks.detection.sizes --smoke 12     # every harmless difference, short runs: only the first loss

Nothing is judged here: relative differences of each step's loss from the reference's, the largest, the mean over the
run, and the mean over the ten steps after the first at which loss or gradient norm differ in any bit.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.detection.case import Case
from benchmarks.detection.cases import find
from benchmarks.detection.held_out import BELOW_THE_NOISE, HELD_OUT_DEFECTS, HELD_OUT_HARMLESS
from benchmarks.detection.runs import NotRunError, record_of
from tests.pool import close_all
from xtrain.align.record import Record

VARIANTS = (
    "1 rank, 4 micro-batches",
    "ZeRO stage 3",
    "PyTorch's fused attention",
    "two samples at a time",
    "one product for",
    "PyTorch's RMSNorm",
    "attention divided by the softmax's sum at last",
)
"""Beginnings of titles, without the precision, of the correct variants that defects are compared with."""
AFTER = 10
"""Steps after a difference first acts."""
TIMES = 2.0
"""A defect is above the noise if its largest or mean difference is above that of every correct variant, or the mean
over the first steps above so many times theirs, which are few numbers and differ much."""


@dataclass(frozen=True)
class Size:
    """Relative differences of the loss: one for each step, and the first step (from 1) at which the run differs."""

    case: Case
    differences: Any
    acts: int

    @property
    def largest(self) -> float:
        """Of all steps."""
        return float(self.differences.max())

    @property
    def mean(self) -> float:
        """Over all steps."""
        return float(self.differences.mean())

    def soon(self, acts: int) -> float:
        """The mean over the steps after `acts`."""
        return float(self.differences[acts - 1 : acts - 1 + AFTER].mean())


def _apart(reference: Record, candidate: Record, column: str) -> Any:
    ours, theirs = reference.column(column), candidate.column(column)
    return (ours != theirs) & ~(np.isnan(ours) & np.isnan(theirs))


def size_of(root: Path, case: Case) -> Size:
    """Of one case, which is run if it has not been."""
    reference, candidate = (record_of(root, each, modules=False) for each in (find(case.reference), case))
    apart = _apart(reference, candidate, "loss") | _apart(reference, candidate, "grad_norm")
    ours, theirs = reference.column("loss"), candidate.column("loss")
    acts = int(reference.step[apart][0]) if apart.any() else 1
    return Size(case, np.abs(theirs - ours) / np.abs(ours), acts)


def compared(cases: tuple[Case, ...], precision: str) -> list[Case]:
    """The correct variants of a precision that defects are compared with."""
    beginnings = tuple(f"{precision}: {beginning}" for beginning in VARIANTS)
    return [case for case in cases if case.title.startswith(beginnings)]


def _sizes(root: Path, cases: list[Case]) -> list[Size]:
    """Of those that run."""
    found = []
    for case in cases:
        try:
            found.append(size_of(root, case))
        except NotRunError as error:
            print(f"{case.title}: not run: {error}", flush=True)
    return found


def _line(*cells: Any) -> None:
    print("| " + " | ".join(f"{c:.1e}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def sizes(root: Path) -> None:
    """Run what is missing, print the table."""
    defects = (*HELD_OUT_DEFECTS, *(below.case for below in BELOW_THE_NOISE))
    for precision in ("bf16", "fp16"):
        noise = _sizes(root, compared(HELD_OUT_HARMLESS, precision))
        found = _sizes(root, [case for case in defects if case.reference == precision])
        most = max(size.largest for size in noise)
        mean = max(size.mean for size in noise)
        print()
        _line(
            "case",
            "acts from step",
            "largest",
            "mean",
            f"mean of {AFTER} steps",
            "of correct variants",
            "above",
        )
        _line(*["---"] * 7)
        for size in noise:
            _line(size.case.title, size.acts, size.largest, size.mean, size.soon(size.acts), "", "correct")
        for size in found:
            soon, usual = size.soon(size.acts), max(other.soon(size.acts) for other in noise)
            above = size.largest > most or size.mean > mean or soon > TIMES * usual
            cells = (size.acts, size.largest, size.mean, soon, usual, "yes" if above else "no")
            _line(size.case.title, *cells)


def smoke(root: Path, steps: int) -> None:
    """The first loss of every harmless difference."""
    _line("case", "first loss", "from the reference's", "largest difference", "applied steps")
    _line(*["---"] * 5)
    for case in HELD_OUT_HARMLESS:
        reference = record_of(root, find(case.reference), steps=steps)
        try:
            found = record_of(root, case, steps=steps)
        except NotRunError as error:
            _line(case.title, f"not run: {error}", "", "", "")
            continue
        ours, theirs = reference.column("loss"), found.column("loss")
        differences = np.abs(theirs - ours) / np.abs(ours)
        finite = int(np.isfinite(found.column("grad_norm")).sum())
        _line(case.title, f"{theirs[0]:.6f}", float(differences[0]), float(differences.max()), finite)


def main() -> None:
    """The command: see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/held-out"), help="of the runs")
    parser.add_argument("--smoke", type=int, metavar="STEPS", help="short runs of the harmless differences")
    args = parser.parse_args()
    root = args.folder.resolve()
    try:
        if args.smoke:
            smoke(root / f"smoke-{args.smoke}", args.smoke)
        else:
            sizes(root / "curves")
    finally:
        close_all()


if __name__ == "__main__":
    main()
