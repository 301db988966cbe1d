"""`align(REF, CAND)`: everything there is to say about two runs, for the command line, reports and tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from xtrain.align.compare import Comparison, Policy, compare, compare_norms
from xtrain.align.differences import Difference, header_differences
from xtrain.align.envelope import Envelope, read_envelope
from xtrain.align.hints import hints
from xtrain.align.modules import ModuleComparison, compare_modules
from xtrain.align.record import Record
from xtrain.align.sources import read_curve
from xtrain.base.errors import RecordError

POLICY = "relative:0.02"
"""Unless another one is asked for."""
ENVELOPE = "envelope.npz"
"""Name under which an envelope is found beside the reference."""


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
    for word, place in (("begins", 0), ("ends", -1)):
        ours, theirs = int(reference.step[place]), int(candidate.step[place])
        if abs(ours - theirs) >= near:
            told.append(
                f"the reference {word} at step {ours} and the candidate at step {theirs}: what is between was not "
                "compared"
            )
    return told


def _not_compared(
    reference: Record, candidate: Record, curve: Comparison, envelope: Envelope | None
) -> list[str]:
    told = [*_ends(reference, candidate)]
    told += [*_gaps(reference, "reference", candidate), *_gaps(candidate, "candidate", reference)]
    if broken := int((~np.isfinite(curve.reference)).sum()):
        told.append(f"the reference itself has a loss that is not finite at {broken} steps")
    if envelope is not None and (beyond := int(np.isinf(curve.limit).sum())):
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
) -> Alignment:
    """Compare two runs.

    Args:
        reference, candidate: files or folders that read_curve() knows.
        policy: "exact", "relative:0.02" (every step), "mean:0.02" or "envelope".
        envelope: its file; None: `envelope.npz` beside the reference.
        loss: the column that is the loss, for files with names of their own.
        partial: accept that some of it cannot be compared.

    Raises:
        RecordError: there is nothing that could be compared, in one sentence.
    """
    chosen = Policy.parse(policy) if isinstance(policy, str) else policy
    measured = find_envelope(Path(reference), envelope) if chosen.kind == "envelope" else None
    found = align_records(read_curve(reference, loss), read_curve(candidate, loss), chosen, measured)
    return replace(found, partial=partial)


def align_records(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None = None
) -> Alignment:
    """`align` for records that were read already."""
    modules = None
    unmeasured: list[str] = []
    apart: list[str] = []
    if reference.modules is not None and candidate.modules is not None:
        bands = None if envelope is None else envelope.bands
        if bands is not None and sorted(bands.names) == sorted(reference.modules.names):
            reference.modules = reference.modules.ordered(bands.names)
        else:
            bands = None
        if policy.kind != "envelope" or bands is not None:
            modules = compare_modules(reference.modules, candidate.modules, policy.tolerance, bands)
            apart = modules.notes
            if not modules.heat:
                modules = None
        else:
            unmeasured.append("the envelope was not measured for these modules: they were not compared")
    without = [record for record in (reference, candidate) if not len(record.step)]
    curve = None if without else compare(reference, candidate, policy, envelope)
    norm = None if curve is None else compare_norms(reference, candidate, policy, envelope)
    if curve is None and modules is None:
        others = "" if len(without) == 2 else ", and the other has no statistics of its modules"
        raise RecordError(
            f"{without[0].path} ({without[0].kind}) has no step with a loss{others}: nothing can be compared"
        )
    notes = [
        f"the {name}: {note}"
        for name, record in (("reference", reference), ("candidate", candidate))
        for note in record.notes
    ]
    notes += unmeasured
    left_out = [
        f"the {name}: {doubt}"
        for name, record in (("reference", reference), ("candidate", candidate))
        for doubt in record.doubts
    ]
    left_out += apart
    if curve is not None:
        left_out = _not_compared(reference, candidate, curve, envelope) + left_out
    depart = policy.kind == "envelope" and modules is not None and modules.first is not None
    return Alignment(
        reference,
        candidate,
        policy,
        curve,
        modules,
        norm,
        envelope,
        header_differences(reference.header, candidate.header),
        [] if curve is None else hints(reference, candidate, curve, norm, depart),
        notes,
        left_out,
    )
