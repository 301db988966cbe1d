"""Verdicts on the runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from benchmarks.detection.case import Case
from benchmarks.detection.cases import find
from benchmarks.detection.runs import NotRunError, record_of
from xtrain.align.alignment import align_records
from xtrain.align.compare import Comparison, Policy
from xtrain.align.envelope import Envelope, measure_records
from xtrain.align.record import Record

RUNS = 8
"""Perturbed runs that an envelope is measured from."""
SIZES = {"one ulp": 0.0, "TF32": 0.0005}
"""Relative perturbations by name of the band, 0 for one ulp; 2^-11 is TF32's unit roundoff."""
MEAN = Policy("mean", 0.02)


@dataclass
class Verdict:
    """What was found of one case.

    Attributes:
        error: why there is no record; "": there is.
        acts: the first step at which any recorded number differs in any bit from the reference's; None: at none.
        began: the step from which on the report says that the run departs; None: aligned.
        loss, norm: the first step at which the loss is outside, and the gradient norm.
        module, module_step, phase: that are named.
        reason: which is the first hint.
        common: the step at which the mean of 2 % is used up; None: within it.
        largest: of the relative differences of the loss; early: in the ten steps after it acts; times: in units of
            what the envelope allows.
    """

    case: Case
    error: str = ""
    acts: int | None = None
    began: int | None = None
    loss: int | None = None
    norm: int | None = None
    module: str = ""
    module_step: int | None = None
    phase: str = ""
    reason: str = ""
    common: int | None = None
    largest: float = 0.0
    early: float = 0.0
    times: float = 0.0

    def near(self, steps: int) -> bool:
        """Whether the step is that at which the defect first acts, or so many beside it."""
        return self.acts is not None and self.began is not None and abs(self.began - self.acts) <= steps

    @property
    def right_step(self) -> bool:
        """Whether it is that step, or one beside it."""
        return self.near(1)

    @property
    def by_curves(self) -> int | None:
        """The step that loss and gradient norm alone name."""
        return min((step for step in (self.loss, self.norm) if step is not None), default=None)

    @property
    def right_module(self) -> bool:
        """Whether the module is the one to blame, where one is."""
        return not self.case.module or fnmatchcase(self.module, self.case.module)

    def summary(self) -> str:
        """In a line."""
        module = f", {self.module} {self.phase} {self.module_step}" if self.module else ""
        return (
            f"{self.case.title}: acts {self.acts}, begins {self.began}, loss {self.loss}, norm {self.norm}{module}; "
            f"2 % {self.common}; {self.largest:.1e}, {self.times:.2g} of the allowed; {self.reason}"
        )


class Judge:
    """Judges cases by envelopes, which are measured when first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._envelopes: dict[tuple[str, str], Envelope] = {}

    def envelope(self, reference: str, band: str) -> Envelope:
        """The envelope of a reference, by runs perturbed by the band's size."""
        if (reference, band) not in self._envelopes:
            size = SIZES[band]
            seeds = [f"{seed}:{size}" if size else str(seed) for seed in range(1, RUNS + 1)]
            runs = [record_of(self.root, find(reference), seed) for seed in seeds]
            self._envelopes[reference, band] = measure_records(runs, size=size)
        return self._envelopes[reference, band]

    def verdicts(self, cases: Iterable[Case]) -> list[Verdict]:
        """Judge cases, each by its own band, and print what was found."""
        found = []
        for case in cases:
            found.append(self.verdict(case))
            print(f"  {found[-1].error or found[-1].summary()}", flush=True)
        return found

    def verdict(self, case: Case, band: str = "") -> Verdict:
        """Judge one case, by the case's own band if no other is named."""
        reference = record_of(self.root, find(case.reference))
        envelope = self.envelope(case.reference, band or case.band)
        try:
            candidate = record_of(self.root, case)
        except NotRunError as error:
            return Verdict(case, error=str(error))
        found = align_records(reference, candidate, Policy("envelope"), envelope)
        assert found.curve is not None
        curve = found.curve
        acts = first_difference(reference, candidate)
        result = Verdict(
            case,
            acts=acts,
            began=found.began,
            loss=curve.first_outside,
            norm=None if found.norm is None else found.norm.first_outside,
            reason=found.hints[0] if found.hints else "",
            largest=curve.largest,
            times=float((np.abs(curve.candidate / curve.centre - 1) / curve.limit).max()),
            early=_early(curve, acts),
        )
        if found.modules is not None and found.modules.first is not None:
            first = found.modules.first
            result.module, result.module_step, result.phase = first.module, first.step, first.phase
        result.common = align_records(reference, candidate, MEAN).curve.first_outside  # type: ignore[union-attr]
        return result


def _early(curve: Comparison, acts: int | None) -> float:
    if acts is None:
        return 0.0
    rows = (curve.step >= acts) & (curve.step < acts + 10)
    return float(curve.difference[rows].max(initial=0.0))


def first_difference(reference: Record, candidate: Record) -> int | None:
    """The first step at which a loss, norm or statistic of two records is not the same; None: all are."""
    steps = []
    for column in ("loss", "grad_norm"):
        apart = reference.column(column) != candidate.column(column)
        steps += reference.step[apart & ~np.isnan(candidate.column(column))][:1].tolist()
    if reference.modules is not None and candidate.modules is not None:
        theirs = candidate.modules.ordered(reference.modules.names)
        for (phase, statistic), ours in reference.modules.values.items():
            if phase not in theirs.steps:
                continue  # real DeepSpeed's gradients are not public
            if (phase, statistic) not in theirs.values:
                continue
            measured, others = reference.modules.steps[phase], theirs.steps[phase]
            steps += np.setxor1d(measured, others)[
                :1
            ].tolist()  # no gradients where one of them skips the step
            common, here, there = np.intersect1d(measured, others, return_indices=True)
            pair = ours[here], theirs.values[phase, statistic][there]
            apart = ((pair[0] != pair[1]) & ~(np.isnan(pair[0]) & np.isnan(pair[1]))).any(axis=1)
            steps += common[apart][:1].tolist()
    return min(steps, default=None)
