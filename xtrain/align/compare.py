"""Whether two curves agree, by how much, and since when not. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from xtrain.align.record import Record
from xtrain.errors import NotImplementedYetError, RecordError


@dataclass(frozen=True)
class Policy:
    """How close is close enough: `tolerance` bounds the relative difference of every step (0: exact bits)."""

    tolerance: float

    @classmethod
    def parse(cls, text: str) -> Policy:
        """Read "exact" or "relative:0.02".

        Raises:
            RecordError: it is neither.
            NotImplementedYetError: the envelope policy.
        """
        if text == "exact":
            return cls(0.0)
        if text == "envelope":
            raise NotImplementedYetError("the envelope policy", "use exact or relative:TOLERANCE")
        kind, _, value = text.partition(":")
        try:
            tolerance = float(value)
        except ValueError:
            tolerance = math.nan
        if kind != "relative" or not tolerance >= 0 or math.isinf(tolerance):
            raise RecordError(
                f"unknown policy {text!r}: use exact or relative:TOLERANCE, such as relative:0.02"
            )
        return cls(tolerance)


@dataclass(frozen=True)
class Comparison:
    """The outcome over the steps that both records have."""

    steps: int
    bit_identical: int
    largest: float
    largest_step: int
    mean: float
    first_outside: int | None
    missing: int

    @property
    def aligned(self) -> bool:
        """Whether every common step is within the policy."""
        return self.first_outside is None

    def sentence(self) -> str:
        """The verdict for a person."""
        if not self.missing:
            return self._verdict()
        return f"{self._verdict()}; {self.missing} steps stand in one record only and were not compared"

    def _verdict(self) -> str:
        verdict = "the curves agree" if self.aligned else f"the curves part at step {self.first_outside}"
        if self.bit_identical == self.steps:
            return f"{verdict}: all {self.steps} steps are equal to the last bit"
        return (
            f"{verdict}: relative difference at most {self.largest:.2e} (step {self.largest_step}), "
            f"mean {self.mean:.2e}, {self.bit_identical} of {self.steps} steps equal to the last bit"
        )


def _relative(reference: float, candidate: float) -> float:
    if reference == candidate or (math.isnan(reference) and math.isnan(candidate)):
        return 0.0
    if not (math.isfinite(reference) and math.isfinite(candidate)):
        return math.inf
    return abs(candidate - reference) / max(abs(reference), 1e-12)


def compare(reference: Record, candidate: Record, policy: Policy) -> Comparison:
    """Compare the losses of two records step by step.

    Raises:
        RecordError: they have no step in common.
    """
    ours, theirs = reference.losses(), candidate.losses()
    common = [step for step in ours if step in theirs]
    if not common:
        raise RecordError(f"{reference.path} and {candidate.path} have no step in common")
    differences = {step: _relative(ours[step], theirs[step]) for step in common}
    largest_step = max(common, key=lambda step: differences[step])
    outside = [step for step in common if differences[step] > policy.tolerance]
    return Comparison(
        steps=len(common),
        bit_identical=sum(difference == 0.0 for difference in differences.values()),
        largest=differences[largest_step],
        largest_step=largest_step,
        mean=sum(differences.values()) / len(common),
        first_outside=outside[0] if outside else None,
        missing=len(ours.keys() ^ theirs.keys()),
    )
