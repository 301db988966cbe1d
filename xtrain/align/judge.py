"""Loss and gradient norm of two records judged together: on common windows, by what was written, by an envelope.

And what else may be the matter when they part: steps that are counted otherwise. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from xtrain.align.compare import Comparison, Policy, compare, compare_norms, no_common
from xtrain.align.envelope import NORM, Envelope
from xtrain.align.record import Record
from xtrain.align.windows import first_step, match
from xtrain.align.written import allow_cutting, common_steps
from xtrain.base.errors import RecordError

FEWEST = 3
"""So many steps at least have to agree before it is said that they agree if counted otherwise."""
MUCH_NEARER = 0.1
"""Curves that agree if counted otherwise are told only if their mean difference becomes so much smaller."""


@dataclass
class Judged:
    """The outcome for both curves.

    Attributes:
        reference, candidate: the records as they were compared: averaged over windows, if they were.
        curve, norm: outcomes; `norm` is None where gradient norms were not judged.
        envelope: by which; averaged over the same windows.
        notes: what was done for the comparison.
        left_out: what could not be compared.
        windowed: whether anything was averaged.
    """

    reference: Record
    candidate: Record
    curve: Comparison
    norm: Comparison | None
    envelope: Envelope | None
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    windowed: bool = False

    @property
    def agree(self) -> bool:
        """Whether both curves do."""
        return self.curve.aligned and (self.norm is None or self.norm.aligned)


def same_unit(reference: Record, candidate: Record) -> None:
    """Refuse to compare steps with samples or tokens.

    Raises:
        RecordError: the axes of the two count different things.
    """
    if reference.unit != candidate.unit:
        raise RecordError(
            f"{reference.path} counts {reference.unit} and {candidate.path} counts {candidate.unit}: they cannot be "
            f"compared step by step; export one of them over the other's axis, or divide its numbers by the "
            f"{candidate.unit if candidate.unit != 'steps' else reference.unit} of a step"
        )


def judge(reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None) -> Judged:
    """Compare losses, and by the envelope gradient norms, of two records that have steps.

    Raises:
        RecordError: nothing can be compared.
    """
    _in_common(reference, candidate)
    try:
        matched = match(reference, candidate)
    except RecordError:
        found = _as_means(reference, candidate, policy, envelope)
        if found is None:
            raise
        return found
    reference, candidate, notes = allow_cutting(matched.reference, matched.candidate)
    windows = matched.windows
    if envelope is not None and reference.begins is not None:
        ends, mine, _ = common_steps(reference.step, candidate.step)
        begins = reference.begins[mine]
        averaged = envelope.over_windows(begins, ends)
        if averaged is None and windows is not None:
            raise RecordError(
                f"the envelope lacks steps of the windows of {windows.length} steps that the curves are means over: "
                "measure it from runs that log every step"
            )
        envelope = averaged or envelope
    curve = compare(reference, candidate, policy, envelope)
    norm = compare_norms(reference, candidate, policy, envelope)
    if policy.kind == "envelope" and envelope is not None and NORM in envelope.limit and norm is None:
        without = [
            name
            for name, record in (("reference", reference), ("candidate", candidate))
            if np.isnan(record.column(NORM)).all()
        ]
        who = " and ".join(f"the {name}" for name in without)
        have = "has" if len(without) == 1 else "have"
        why = f"{who} {have} none" if without else "no step has that of both"
        notes.append(f"the gradient norm, which the envelope has, was not compared: {why}")
    return Judged(
        reference,
        candidate,
        curve,
        norm,
        envelope,
        matched.notes + notes,
        matched.left_out,
        windows is not None,
    )


def _as_means(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None
) -> Judged | None:
    """Two records of which one tells windows, and the other, of a kind that does not tell, has a row for each of them:
    the outcome if they agree as means over those; None else."""
    if (reference.begins is None) == (candidate.begins is None):
        return None
    silent, told = (reference, candidate) if reference.begins is None else (candidate, reference)
    _, mine, its = common_steps(silent.step, told.step)
    if silent.kind == Record.kind or len(mine) < FEWEST or told.begins is None:
        return None
    means = replace(silent.take(mine), begins=told.begins[its])
    name, pair = ("reference", (means, told)) if silent is reference else ("candidate", (told, means))
    found = _tried(*pair, policy, envelope)
    if found is not None:
        found.notes.append(
            f"the {name} does not say whether its losses are means over windows of steps: they agree as means over the "
            "other file's"
        )
    return found


def _tried(
    reference: Record,
    candidate: Record,
    policy: Policy,
    envelope: Envelope | None,
    instead_of: Judged | None = None,
) -> Judged | None:
    """The outcome of a guess, if it agrees on enough steps, and much better than that which it is instead of; None
    else."""
    try:
        found = judge(reference, candidate, policy, envelope)
    except RecordError:  # a guess that cannot be compared is a wrong one
        return None
    if not found.agree or found.curve.steps < FEWEST:
        return None
    if instead_of is not None and found.curve.mean > MUCH_NEARER * instead_of.curve.mean:
        return None
    return found


def counted_otherwise(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None, found: Judged
) -> list[str]:
    """Hints, if the curves would agree with a step more or less.

    Args:
        found: the outcome as the steps are numbered.

    Raises:
        RecordError: they begin a step apart and agree once they are shifted; or one of them counts something that is a
            multiple of the other's steps.
    """
    apart = first_step(reference) - first_step(candidate)
    near = found.agree and abs(apart) == 1 and found.curve.mean > 0
    if found.agree and not near:
        return []
    for by in (apart,) if near else (1, -1):
        if _tried(reference, candidate.shifted(by), policy, envelope, found) is None:
            continue
        if by == apart:
            raise RecordError(
                f"{candidate.path} is shifted by one step against {reference.path}: it begins with step "
                f"{first_step(candidate)} and the other with step {first_step(reference)}, and with {by:+d} on its "
                f"step numbers the curves agree: pass --shift {by}"
            )
        if not found.agree and not apart:
            return [
                f"the candidate is shifted by one step: with {by:+d} on its step numbers (--shift {by}) the curves "
                "agree: its data or its schedule are a step "
                f"{'ahead' if by > 0 else 'behind'}, or its steps are counted otherwise"
            ]
    if found.agree:
        return []
    _multiples(reference, candidate, policy, envelope, found)
    return _means(reference, candidate, policy, envelope, found)


def _means(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None, found: Judged
) -> list[str]:
    """A hint, if a file that logs every n-th step would agree if its losses were means over n steps."""
    if reference.begins is not None or candidate.begins is not None:
        return []
    for which, (name, record) in enumerate((("reference", reference), ("candidate", candidate))):
        apart = np.diff(record.step)
        if len(apart) < FEWEST or apart[0] < 2 or (apart != apart[0]).any():
            continue
        windowed = replace(record, begins=record.step - apart[0])
        pair = (windowed, candidate) if which == 0 else (reference, windowed)
        if _tried(*pair, policy, envelope, found) is not None:
            return [
                f"the curves agree if the losses of the {name} are means over {apart[0]} steps each, which this sort "
                "of file does not say: some tools write such means (trainer_state.json and Megatron's logs say so)"
            ]
    return []


def _multiples(
    reference: Record, candidate: Record, policy: Policy, envelope: Envelope | None, found: Judged
) -> None:
    for record, other in ((reference, candidate), (candidate, reference)):
        many = unit_size(record)
        if many is None or record.begins is not None or unit_size(other) is not None:
            continue
        divided = record.take(slice(None))
        divided.step = record.step // many
        pair = (divided, other) if record is reference else (other, divided)
        guess = _tried(*pair, policy, envelope, found)
        if guess is not None and guess.curve.steps >= FEWEST * found.curve.steps:
            raise RecordError(
                f"{record.path} {_counts(many)}, and the curves agree once they are divided by it"
            )


def unit_size(record: Record) -> int | None:
    """What all step numbers of a record are multiples of, from the first on; None: of 1."""
    steps = record.step
    if len(steps) < FEWEST or steps[0] < 2 or record.begins is not None:
        return None
    many = int(steps[0])
    return many if np.array_equal(steps, many * np.arange(1, len(steps) + 1)) else None


def _counts(many: int) -> str:
    return (
        f"has only multiples of {many} as step numbers: it may count samples or tokens ({many} a step), and its step "
        "numbers are to be divided by that before they are compared"
    )


def _in_common(reference: Record, candidate: Record) -> None:
    """Refuse two records of single steps that have none in common, and say what it may be.

    Raises:
        RecordError: they have none.
    """
    if reference.begins is not None or candidate.begins is not None:
        return
    if len(common_steps(reference.step, candidate.step)[0]):
        return
    for record, other in ((reference, candidate), (candidate, reference)):
        many = unit_size(record)
        if many is not None and unit_size(other) is None:
            raise no_common(reference, candidate, f"; {record.path} {_counts(many)}")
    raise no_common(reference, candidate)
