"""`align(REF, CAND)`: everything there is to say about two runs, for the command line, reports and tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from xtrain.align.compare import Comparison, Policy, skipped_by_either
from xtrain.align.differences import Difference, header_differences
from xtrain.align.envelope import Envelope, read_envelope
from xtrain.align.hints import hints
from xtrain.align.judge import Judged, counted_otherwise, judge, same_unit
from xtrain.align.modules import ModuleComparison, compare_modules
from xtrain.align.record import Record
from xtrain.align.sources import read_curve
from xtrain.align.windows import first_step
from xtrain.base.errors import RecordError

POLICY = "relative:0.02"
"""Unless another one is asked for."""
ENVELOPE = "envelope.npz"
"""Name under which an envelope is found beside the reference."""
LARGEST_SHIFT = 2**40
"""More steps than any run has, and less than overflow."""


@dataclass
class Alignment:
    """Two runs compared.

    Attributes:
        curve: the outcome for the losses; None when the files have none (msProbe's).
        norm: the outcome for the gradient norms; None unless the policy is the envelope, and both have them.
        modules: the outcome for the modules; None when one of them has no statistics.
        differences: of configuration and environment.
        hints: where to look first.
        notes: what was odd about the files.
        left_out: what could not be compared, or not be trusted, a sentence each.
        partial: whether that is accepted.
    """

    reference: Record
    candidate: Record
    policy: Policy
    curve: Comparison | None
    modules: ModuleComparison | None
    norm: Comparison | None = None
    envelope: Envelope | None = None
    differences: list[Difference] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    partial: bool = False

    @property
    def aligned(self) -> bool:
        """The verdict: by the envelope that of everything measured; else that of the losses, if there are any."""
        curves = [outcome.aligned for outcome in (self.curve, self.norm) if outcome is not None]
        if curves and self.policy.kind != "envelope":
            return all(curves)
        return all(curves) and (self.modules is None or self.modules.first is None)

    @property
    def exit_code(self) -> int:
        """0: aligned, 1: not, 2: aligned as far as they could be compared, and that is not accepted."""
        if not self.aligned:
            return 1
        return 2 if self.left_out and not self.partial else 0

    @property
    def began(self) -> int | None:
        """The first step at which anything that was compared departs; None: they are aligned."""
        if self.aligned:
            return None
        found = [outcome.first_outside for outcome in (self.curve, self.norm) if outcome is not None]
        if self.modules is not None and self.modules.first is not None:
            found.append(self.modules.first.step)
        return min(step for step in found if step is not None)

    def _by_modules(self) -> bool:
        """Whether nothing but statistics of modules departs."""
        return not self.aligned and all(
            outcome.aligned for outcome in (self.curve, self.norm) if outcome is not None
        )

    def sentence(self) -> str:
        """The verdict for a person."""
        if self.curve is None:
            assert self.modules is not None
            return self.modules.sentence()
        parts = [outcome.sentence() for outcome in (self.curve, self.norm) if outcome is not None]
        if self.modules is not None and self.modules.first is not None and self._by_modules():
            parts.append(self.modules.first.sentence())
        elif self.began is not None:
            parts.append(f"the departure begins at step {self.began}")
        return "; ".join(parts)


def _stride(record: Record) -> int:
    return int(np.median(np.diff(record.step))) if len(record.step) > 1 else 1


def _gaps(record: Record, name: str, other: Record) -> list[str]:
    """Steps that a record lacks between its first and last, and the other has."""
    wide = np.flatnonzero(np.diff(record.step) > _stride(record))
    between = [(record.step[row], record.step[row + 1]) for row in wide]
    lost = [pair for pair in between if ((other.step > pair[0]) & (other.step < pair[1])).any()]
    if not lost:
        return []
    many = "1 gap" if len(lost) == 1 else f"{len(lost)} gaps"
    return [f"the {name} has {many}: steps between {lost[0][0]} and {lost[0][1]} are missing"]


def _ends(reference: Record, candidate: Record) -> list[str]:
    """Where the steps of one begin earlier or end later, by more than one of them is apart from the next."""
    near = max(_stride(reference), _stride(candidate))
    told = []
    for word, ours, theirs in (
        ("begins", first_step(reference), first_step(candidate)),
        ("ends", int(reference.step[-1]), int(candidate.step[-1])),
    ):
        if abs(ours - theirs) >= near:
            told.append(
                f"the reference {word} at step {ours} and the candidate at step {theirs}: what is between was not "
                "compared"
            )
    return told


def _not_compared(reference: Record, candidate: Record, found: Judged) -> list[str]:
    told = [*_ends(reference, candidate), *found.left_out]
    if not found.windowed:
        told += [*_gaps(reference, "reference", candidate), *_gaps(candidate, "candidate", reference)]
    if broken := int((~np.isfinite(found.curve.reference)).sum()):
        told.append(f"the reference itself has a loss that is not finite at {broken} steps")
    if found.envelope is not None and (beyond := int(np.isinf(found.curve.limit).sum())):
        told.append(f"the envelope does not cover {beyond} of the steps: they were not judged")
    return told


def find_envelope(reference: Path, given: str | Path | None) -> Envelope | None:
    """The envelope that was named, or the one beside the reference."""
    if given is not None:
        return read_envelope(Path(given))
    beside = (reference if reference.is_dir() else reference.parent) / ENVELOPE
    return read_envelope(beside) if beside.exists() else None


def align(
    reference: str | Path,
    candidate: str | Path,
    policy: str | Policy = POLICY,
    envelope: str | Path | None = None,
    loss: str | None = None,
    partial: bool = False,
    shift: int = 0,
) -> Alignment:
    """Compare two runs.

    Args:
        reference, candidate: files or folders that read_curve() knows.
        policy: "exact", "relative:0.02" (every step), "mean:0.02" or "envelope".
        envelope: its file; None: `envelope.npz` beside the reference.
        loss: the column that is the loss, for files with names of their own.
        partial: accept that some of it cannot be compared.
        shift: is added to the candidate's step numbers: 1 for one that counts from 0 beside one that counts from 1.

    Raises:
        RecordError: there is nothing that could be compared, or steps are counted otherwise, in one sentence.
    """
    if isinstance(shift, bool) or not isinstance(shift, int) or abs(shift) > LARGEST_SHIFT:
        raise RecordError(f"shift is a whole number of steps, such as 1 or -1, not {shift!r}")
    chosen = Policy.parse(policy) if isinstance(policy, str) else policy
    measured = find_envelope(Path(reference), envelope) if chosen.kind == "envelope" else None
    one, two = read_curve(reference, loss), read_curve(candidate, loss)
    found = align_records(one, two, chosen, measured, shift)
    return replace(found, partial=partial)


def _modules(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None
) -> tuple[ModuleComparison | None, list[str], list[str]]:
    """(the outcome for the modules, if there is any; notes; what could not be compared)."""
    bands = None if envelope is None else envelope.bands
    have = [name for name, record in _named(reference, candidate) if record.modules is not None]
    if reference.modules is None or candidate.modules is None:
        told = [f"only the {have[0]} has statistics of modules: they were not compared"] if have else []
        if policy.kind != "envelope":
            return None, [], []
        return (None, [], told) if bands is not None else (None, told, [])
    if bands is not None and sorted(bands.names) == sorted(reference.modules.names):
        reference.modules = reference.modules.ordered(bands.names)
    else:
        bands = None
    if policy.kind == "envelope" and bands is None:
        return None, ["the envelope was not measured for these modules: they were not compared"], []
    skipped = skipped_by_either(reference, candidate)
    found = compare_modules(reference.modules, candidate.modules, policy.tolerance, bands, skipped)
    return (found if found.heat else None), [], found.notes


def _named(reference: Record, candidate: Record) -> tuple[tuple[str, Record], tuple[str, Record]]:
    return ("reference", reference), ("candidate", candidate)


def align_records(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None = None, shift: int = 0
) -> Alignment:
    """`align` for records that were read already.

    Raises:
        RecordError: as `align` does.
    """
    given = candidate
    candidate = candidate.shifted(shift)
    modules, notes, apart = _modules(reference, candidate, policy, envelope)
    without = [record for record in (reference, candidate) if not len(record.step)]
    if without and modules is None:
        others = "" if len(without) == 2 else ", and the other has no statistics of its modules"
        raise RecordError(
            f"{without[0].path} ({without[0].kind}) has no step with a loss{others}: nothing can be compared"
        )
    notes = [
        f"the {name}: {note}" for name, record in _named(reference, candidate) for note in record.notes
    ] + notes
    left_out = [
        f"the {name}: {doubt}" for name, record in _named(reference, candidate) for doubt in record.doubts
    ]
    left_out += apart
    for what, factors in [] if envelope is None else envelope.wide():
        notes.append(
            f"the envelope allows {factors.lasting:.0f} times the measured spread in {what}: a defect may hide in it"
        )
    differences = header_differences(reference.header, candidate.header)
    if without:
        return Alignment(
            reference, candidate, policy, None, modules, None, envelope, differences, [], notes, left_out
        )
    same_unit(reference, candidate)
    found = judge(reference, candidate, policy, envelope)
    told = [] if shift else counted_otherwise(reference, given, policy, envelope, found)
    depart = policy.kind == "envelope" and modules is not None and modules.first is not None
    look = hints(
        found.reference, found.candidate, found.curve, found.norm, depart, whole=(reference, candidate)
    )
    if shift:
        notes = [f"the candidate: {shift:+d} was added to its step numbers", *notes]
    return Alignment(
        found.reference,
        found.candidate,
        policy,
        found.curve,
        modules,
        found.norm,
        found.envelope,
        differences,
        [*look, *told],
        notes + found.notes,
        _not_compared(reference, candidate, found) + left_out,
    )
