"""Whether two curves agree, by how much, and since when not. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from xtrain.align import band
from xtrain.align.envelope import LOSS, NORM, Envelope
from xtrain.align.record import Floats, Record, Steps
from xtrain.align.written import EPS, common_steps, rounding
from xtrain.base.errors import RecordError

KINDS = ("exact", "relative", "mean", "envelope")
TINY = 1e-12


@dataclass(frozen=True)
class Policy:
    """How close is close enough.

    Attributes:
        kind: "exact": the same bits. "relative": `tolerance` bounds the relative difference of every step.
            "mean": `tolerance` bounds its mean over the steps. "envelope": a measured band.
        tolerance: of "relative" and "mean".
    """

    kind: str
    tolerance: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read "exact", "envelope", "relative:0.02" or "mean:0.02".

        Raises:
            RecordError: it is none of them.
        """
        if text in ("exact", "envelope"):
            return cls(text)
        kind, _, value = text.partition(":")
        try:
            tolerance = float(value)
        except ValueError:
            tolerance = math.nan
        if kind not in ("relative", "mean") or not tolerance >= 0 or math.isinf(tolerance):
            raise RecordError(
                f"unknown policy {text!r}: use exact, envelope, relative:TOLERANCE (every step) or mean:TOLERANCE, "
                "such as relative:0.02"
            )
        return cls(kind, tolerance)

    def __str__(self) -> str:
        return f"{self.kind}:{self.tolerance:g}" if self.kind in ("relative", "mean") else self.kind


@dataclass(frozen=True)
class Comparison:
    """The outcome over the steps that both records have.

    Attributes:
        column: "loss" or "grad_norm".
        bit_identical: steps whose values are the same bits (of rounded numbers: the same as far as written).
        largest, largest_step, mean: of the relative differences.
        first_outside: the first step that the policy does not allow; None: they agree.
        missing: steps that stand in one record only.
        step, reference, candidate, difference, limit: by step, for pictures; `limit` is the largest relative
            difference that is allowed at the step (infinite where a step is not judged by itself).
        centre: what `limit` is measured from. By the envelope `limit` is that of what lasts.
        written: whether digits were allowed for, as numbers were rounded when they were written.
    """

    policy: Policy
    column: str
    steps: int
    bit_identical: int
    largest: float
    largest_step: int
    mean: float
    first_outside: int | None
    missing: int
    step: Steps = field(repr=False)
    reference: Floats = field(repr=False)
    candidate: Floats = field(repr=False)
    difference: Floats = field(repr=False)
    limit: Floats = field(repr=False)
    centre: Floats = field(repr=False)
    written: bool = False

    @property
    def aligned(self) -> bool:
        """Whether every common step is within the policy."""
        return self.first_outside is None

    def allowed(self) -> tuple[Floats, Floats]:
        """The smallest and largest value that are allowed at every step; NaN where everything is."""
        limit = np.where(np.isfinite(self.limit), self.limit, np.nan)
        with np.errstate(invalid="ignore", over="ignore"):
            reach = np.abs(self.centre) * limit
            return self.centre - reach, self.centre + reach

    def sentence(self) -> str:
        """The verdict for a person."""
        if not self.missing:
            return self._verdict()
        stand = "step stands" if self.missing == 1 else "steps stand"
        were = "was" if self.missing == 1 else "were"
        return f"{self._verdict()}; {self.missing} {stand} in one record only and {were} not compared"

    def _verdict(self) -> str:
        curves = "curves" if self.column == LOSS else "gradient norms"
        verdict = f"the {curves} agree" if self.aligned else f"the {curves} part at step {self.first_outside}"
        equal = "equal as far as written" if self.written else "equal to the last bit"
        if self.bit_identical == self.steps:
            return f"{verdict}: all {self.steps} steps are {equal}"
        return (
            f"{verdict}: relative difference at most {self.largest:.2e} (step {self.largest_step}), "
            f"mean {self.mean:.2e}, {self.bit_identical} of {self.steps} steps {equal}"
        )


def relative_difference(reference: Floats, candidate: Floats, rounded: Floats | float = 0.0) -> Floats:
    """|candidate - reference| / |reference|, element by element.

    Zero where both are NaN or the same infinity, infinite where one of them is not finite. `rounded`, in the unit of
    the values, is subtracted from the difference: that much is owed to the digits that were written.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        # The difference of two decimals has errors of its own.
        allowed = np.where(np.greater(rounded, 0.0), rounded + 4 * EPS * np.abs(reference), 0.0)
        apart = np.maximum(np.abs(candidate - reference) - allowed, 0.0)
        found = apart / np.maximum(np.abs(reference), TINY)
    found = np.where(np.isfinite(reference) & np.isfinite(candidate), found, np.inf)
    same = (reference == candidate) | (np.isnan(reference) & np.isnan(candidate))
    return np.asarray(np.where(same, 0.0, found))


def _first_over_mean(difference: Floats, tolerance: float) -> int | None:
    """Where the sum has used up what the whole run may differ; None when the mean is within the tolerance."""
    if difference.mean() <= tolerance:
        return None
    spent = np.cumsum(difference) > tolerance * len(difference)
    return int(np.argmax(spent))


def no_common(reference: Record, candidate: Record, more: str = "") -> RecordError:
    """Two records have no step in common; `more` is what that may come from."""

    def span(record: Record) -> str:
        return f"{record.step[0]} to {record.step[-1]}" if len(record.step) else "none"

    return RecordError(
        f"{reference.path} and {candidate.path} have no step in common: they have steps {span(reference)} and "
        f"{span(candidate)}{more}"
    )


def no_envelope() -> RecordError:
    """The policy is the envelope, and there is none."""
    return RecordError(
        "the envelope policy needs an envelope: measure one with `xtrain align envelope`, and name it with "
        "--envelope FILE"
    )


def compare(
    reference: Record,
    candidate: Record,
    policy: Policy,
    envelope: Envelope | None = None,
    column: str = LOSS,
) -> Comparison:
    """Compare a column of two records step by step.

    Raises:
        RecordError: they have no step in common (with the envelope), or the policy needs an envelope.
    """
    step, mine, its = common_steps(reference.step, candidate.step)
    if not len(step):
        raise no_common(reference, candidate)
    ours, theirs = reference.column(column)[mine], candidate.column(column)[its]
    rounded = rounding(reference, candidate, column, mine, its)
    difference = relative_difference(ours, theirs, rounded)
    centre, limit = ours, np.full(len(step), policy.tolerance)
    outside = difference > limit
    if policy.kind == "mean":
        limit = np.full(len(step), np.inf)  # no step alone is bounded
        first = _first_over_mean(difference, policy.tolerance)
        outside = np.arange(len(step)) == (-1 if first is None else first)
    elif policy.kind == "envelope":
        centre, limit, once = _from_envelope(step, ours, envelope, column)
        outside = band.outside(relative_difference(centre, theirs, rounded), limit, once)
        outside |= ~np.isfinite(theirs) & np.isfinite(centre)  # beyond the envelope's steps, too
    largest = int(np.argmax(difference))
    first_row = int(np.argmax(outside)) if outside.any() else None
    return Comparison(
        policy=policy,
        column=column,
        steps=len(step),
        bit_identical=int((difference == 0.0).sum()),
        largest=float(difference[largest]),
        largest_step=int(step[largest]),
        mean=float(difference.mean()),
        first_outside=None if first_row is None else int(step[first_row]),
        missing=len(reference.step) + len(candidate.step) - 2 * len(step),
        step=step,
        reference=ours,
        candidate=theirs,
        difference=difference,
        limit=limit,
        centre=centre,
        written=bool(np.any(rounded > 0)),
    )


def _from_envelope(
    step: Steps, reference: Floats, envelope: Envelope | None, column: str
) -> tuple[Floats, Floats, Floats]:
    """(centre, limit, limit of a single step); where the envelope was not measured, the reference, and no limit."""
    if envelope is None:
        raise no_envelope()
    covered, here, there = common_steps(step, envelope.step)
    if not len(covered):
        raise RecordError(
            f"the envelope has steps {envelope.step[0]} to {envelope.step[-1]}, and none of those of the records"
        )
    centre, limit, once = reference.copy(), np.full(len(step), np.inf), np.full(len(step), np.inf)
    centre[here], limit[here] = envelope.centre[column][there], envelope.limit[column][there]
    once[here] = envelope.once[column][there]
    return centre, limit, once


def skipped_by_either(reference: Record, candidate: Record) -> Steps:
    """Steps whose update one of the two skipped."""
    return np.union1d(reference.skipped(), candidate.skipped())


def compare_norms(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None
) -> Comparison | None:
    """Compare the gradient norms by the envelope; None with another policy, or where one of the three has none.

    Steps at which one of the records has no norm, or skipped the update as gradients overflowed, are not compared.
    """
    if policy.kind != "envelope" or envelope is None or NORM not in envelope.limit:
        return None
    skipped = skipped_by_either(reference, candidate)
    ours, theirs = (
        record.take(~np.isnan(record.column(NORM)) & ~np.isin(record.step, skipped))
        for record in (reference, candidate)
    )
    if not len(common_steps(common_steps(ours.step, theirs.step)[0], envelope.step)[0]):
        return None
    return compare(ours, theirs, policy, envelope, NORM)
