"""What known patterns say about the cause of a departure. A hint is a place to look first, not a proof."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from xtrain.align.band import COARSEST
from xtrain.align.compare import TINY, Comparison, relative_difference
from xtrain.align.record import Floats, Record
from xtrain.align.written import EPS, common_steps, rounding

AFTER_RESTART = 20
"""A departure within so many steps after a restart is blamed on it."""
BEFORE_LOSS = 50
"""How many steps earlier a loss scale may collapse and still be blamed (GLM-130B's collapsed about 30 before)."""
SMALL_SPREAD = 0.1
SAME_RATE, FEWEST = 1e-6, 3
"""Learning rates are the same within it; and at so many steps at least, before they are called a step apart."""
SMALLEST, LARGEST = 1e-5, 1e-2
"""Between these a single column's tolerance is kept, whatever is allowed of the loss."""
ALONE = 0.01
"""A rank departs alone when the others differ by at most so much of what it does;"""
ABOVE_BEFORE, ABOVE_UNIT = 10.0, 4.0
"""and when it differs by more than so many times the most that any rank did before, and, where losses were computed in
16 bits, so many units in the last place of a bfloat16."""
COARSE_BITS, MICRO_BATCHES = 18, 64
"""Losses of 16 bits are known by their mantissas: they fit into 8 bits (bfloat16) or 11 (float16), and sums over up to
so many micro-batches into so many bits."""
SAMPLE = 4096
"""So many losses say whether all have 16 bits."""


class Evidence:
    """Two records and the outcome of their comparison, with columns over the common steps.

    Attributes:
        outcome, norm: for the losses, and for the gradient norms if they were judged.
        whole: the records with all their rows, where the others were averaged over windows.
        at: row of the first step at which either is outside.
        loss_at: row at which the loss is; None: it is not.
    """

    def __init__(
        self,
        reference: Record,
        candidate: Record,
        outcome: Comparison,
        norm: Comparison | None,
        whole: tuple[Record, Record] | None = None,
    ) -> None:
        self.whole = whole or (reference, candidate)
        self.reference, self.candidate, self.outcome, self.norm = reference, candidate, outcome, norm
        self.step, self._mine, self._its = common_steps(reference.step, candidate.step)
        self.loss_at = self._row(outcome)
        rows = [row for row in (self.loss_at, self._row(norm)) if row is not None]
        self.at = min(rows)

    def _row(self, outcome: Comparison | None) -> int | None:
        if outcome is None or outcome.first_outside is None:
            return None
        return int(np.searchsorted(self.step, outcome.first_outside))

    def pair(self, name: str) -> tuple[Floats, Floats] | None:
        """A column of both over the common steps; None when one of them lacks it."""
        ours, theirs = self.reference.column(name)[self._mine], self.candidate.column(name)[self._its]
        return None if np.isnan(ours).all() or np.isnan(theirs).all() else (ours, theirs)

    def apart(self, name: str) -> Floats | None:
        """Relative difference of a column over the common steps, beyond what its digits may differ by."""
        pair = self.pair(name)
        if pair is None:
            return None
        return relative_difference(
            *pair, rounding(self.reference, self.candidate, name, self._mine, self._its)
        )

    def first_apart(self, name: str, tolerance: Floats | float) -> int | None:
        """Row at which a column first differs by more than `tolerance`, where both have a value."""
        pair, apart = self.pair(name), self.apart(name)
        if pair is None or apart is None:
            return None
        beyond = ~(np.isnan(pair[0]) | np.isnan(pair[1])) & (apart > tolerance)
        return int(np.argmax(beyond)) if beyond.any() else None


def _not_finite(found: Evidence) -> str | None:
    bad = ~np.isfinite(found.outcome.candidate) & np.isfinite(found.outcome.reference)
    if not bad.any() or int(np.argmax(bad)) != found.at:
        return None
    return f"the candidate's loss is not finite at step {found.step[found.at]}: an overflow, or bad input"


def _loss_scale(found: Evidence) -> str | None:
    pair = found.pair("loss_scale")
    if pair is None:
        return None
    first = max(0, found.at - BEFORE_LOSS)
    fallen = pair[1][first : found.at + 1] <= pair[0][first : found.at + 1] / 4
    if not fallen.any():
        return None
    row = first + int(np.argmax(fallen))
    return (
        f"the candidate's loss scale has collapsed at step {found.step[row]}, before the loss ({pair[1][row]:g} "
        f"instead of {pair[0][row]:g}): gradients overflow; look at the module with the largest gradients"
    )


def _restart(found: Evidence) -> str | None:
    departed = found.step[found.at]
    for name, record in (("candidate", found.candidate), ("reference", found.reference)):
        for restart in record.restarts():
            if restart < departed <= restart + AFTER_RESTART:
                return (
                    f"the {name} was restarted at step {restart}, just before: a state was not restored (optimizer, "
                    "loss scale, schedule, random numbers or position in the data)"
                )
    return None


def _learning_rate(found: Evidence) -> str | None:
    row = found.first_apart("lr", SAME_RATE)
    if row is None or row > found.at:
        return None
    pair = found.pair("lr")
    assert pair is not None
    differs = f"the learning rate differs since step {found.step[row]} ({pair[1][row]:g} instead of {pair[0][row]:g}): "
    by = _rates_apart(*found.whole)
    if by is None:
        return f"{differs}compare schedules, and at which step each of them starts"
    later, earlier = ("reference", "candidate") if by > 0 else ("candidate", "reference")
    return (
        f"{differs}each of the {earlier}'s is the {later}'s of the next step; one of the tools may write it after its "
        "schedule has moved on, or the schedules start a step apart"
    )


def _rates_apart(reference: Record, candidate: Record) -> int | None:
    """1 or -1, if files of different tools have the same rates with that added to the candidate's steps."""
    if reference.kind == candidate.kind:
        return None
    for by in (1, -1):
        _, mine, its = common_steps(reference.step, candidate.step + by)
        ours, theirs = reference.column("lr")[mine], candidate.column("lr")[its]
        known = ~(np.isnan(ours) | np.isnan(theirs))
        apart = relative_difference(ours, theirs, rounding(reference, candidate, "lr", mine, its))
        if known.sum() >= FEWEST and (apart[known] <= SAME_RATE).all():
            return by
    return None


def _skipped(found: Evidence) -> str | None:
    pair = found.pair("applied")
    if pair is None:
        return None
    apart = np.flatnonzero(pair[0][: found.at + 1] != pair[1][: found.at + 1])
    if not len(apart):
        return None
    who = "candidate" if pair[1][apart[0]] < pair[0][apart[0]] else "reference"
    return f"the {who} alone skipped the update of step {found.step[apart[0]]}: its gradients were not finite"


def _one_rank(found: Evidence) -> str | None:
    ranks = int(found.reference.header.get("world_size") or 0)
    if ranks < 2 or found.candidate.header.get("world_size") != ranks:
        return None
    pairs = [found.pair(f"loss_by_rank.{rank}") for rank in range(ranks)]
    known = np.array([pair for pair in pairs if pair is not None])
    if len(known) != ranks:
        return None
    apart = np.stack([relative_difference(*pair) for pair in known])
    before = np.maximum.accumulate(apart.max(axis=0))
    before = np.concatenate([[0.0], before[:-1]])
    coarse = _in_16_bits(known[:, 0]) or _in_16_bits(known[:, 1])
    unit = COARSEST if coarse else 0.0
    allowed = np.clip(found.outcome.limit, SMALLEST, LARGEST)
    departed = (apart > np.maximum(allowed, np.maximum(ABOVE_BEFORE * before, ABOVE_UNIT * unit))).any(axis=0)
    if not departed.any():
        return None
    row = int(np.argmax(departed))
    rank, others = int(np.argmax(apart[:, row])), np.sort(apart[:, row])[:-1]
    if row > found.at or others.max() > ALONE * apart[rank, row]:
        return None
    return (
        f"rank {rank} departs alone at step {found.step[row]} (by {apart[rank, row]:.1e}, the others by at most "
        f"{others.max():.1e}, and before that step no rank by more than {before[row]:.1e}): look at what only that "
        "rank has: its hardware, its data, or a random state"
    )


def _in_16_bits(values: Floats) -> bool:
    """Whether these are numbers of 16 bits, or means of equally many such numbers."""
    there = values[np.isfinite(values) & (values != 0)][:SAMPLE]
    for number in range(1, MICRO_BATCHES, 2):  # powers of two change no mantissa
        mantissas = np.ldexp(np.frexp(there * number)[0], COARSE_BITS)
        # Dividing and multiplying may change the last bits of a float64.
        if (np.abs(mantissas - np.rint(mantissas)) <= 4 * EPS * np.abs(mantissas)).all():
            return len(there) > 0
    return False


def _from_the_start(found: Evidence) -> str | None:
    if found.loss_at != 0 or found.step[0] > 1:
        return None
    ratio = found.outcome.candidate / found.outcome.reference - 1
    steady = (
        np.isfinite(ratio).all() and abs(ratio.mean()) > 0 and ratio.std() < SMALL_SPREAD * abs(ratio.mean())
    )
    if steady:
        return (
            f"the loss is {1 + ratio.mean():.4g} times the reference's at every step: it is averaged or summed "
            "differently (world size, accumulation steps, tokens that are not counted)"
        )
    return "the losses differ since the first step, before any update: other data, or other initial weights"


def _norm_ratio(found: Evidence) -> str | None:
    pair = found.pair("grad_norm")
    if pair is None or found.norm is None or found.norm.aligned or found.step[0] > 1:
        return None
    with np.errstate(invalid="ignore"):  # gradients that overflow in both
        ratio = pair[1] / np.maximum(np.abs(pair[0]), TINY)
    if not np.isfinite(ratio[0]) or abs(ratio[0] - 1) < SMALL_SPREAD:
        return None
    begin = ratio[: max(1, found.loss_at or len(ratio))]  # until the runs are others anyway
    if not np.isfinite(begin).all() or begin.std() > SMALL_SPREAD * abs(begin.mean() - 1):
        return None
    return (
        f"the gradient norm is {begin[0]:.4g} times the reference's since the first step: gradients are averaged or "
        "summed differently (world size, accumulation steps), or the norm is defined differently (after clipping)"
    )


def _gradient_first(found: Evidence) -> str | None:
    row = found.at
    if found.norm is None:  # not judged: a tolerance has to do, and norms vary more than losses
        apart = found.first_apart("grad_norm", 10 * np.clip(found.outcome.limit, SMALLEST, LARGEST))
        if apart is None or apart > found.at:
            return None
        row = apart
    elif found.norm.first_outside is None or found.norm.first_outside > found.step[row]:
        return None
    pair = found.pair("grad_norm")
    assert pair is not None
    when = "before the loss"
    if found.loss_at is None:
        when = "and the loss does not"
    elif row == found.loss_at:
        when = "at the same step as the loss"
    values = f"{pair[1][row]:.6g} instead of {pair[0][row]:.6g}"
    return (
        f"the gradient norm departs at step {found.step[row]}, {when} ({values}): "
        "look at backward, at the reduction over ranks and at clipping"
    )


PATTERNS: tuple[Callable[[Evidence], str | None], ...] = (
    _not_finite,
    _loss_scale,
    _restart,
    _learning_rate,
    _skipped,
    _one_rank,
    _from_the_start,
    _norm_ratio,
    _gradient_first,
)
"""The most telling first."""
_MODULES_ALONE = (
    "losses and gradient norms agree, and a module does not: something too small for them to show, such as a flipped "
    "bit, or other arithmetic in that module"
)


def hints(
    reference: Record,
    candidate: Record,
    outcome: Comparison,
    norm: Comparison | None = None,
    modules_depart: bool = False,
    whole: tuple[Record, Record] | None = None,
) -> list[str]:
    """What the patterns say; empty for runs that agree.

    Args:
        outcome, norm: for the losses, and for the gradient norms if they were judged.
        modules_depart: whether a module does, by the envelope.
        whole: both records with all rows, where `reference` and `candidate` were averaged over windows.
    """
    if outcome.aligned and (norm is None or norm.aligned):
        return [_MODULES_ALONE] if modules_depart else []
    evidence = Evidence(reference, candidate, outcome, norm, whole)
    found = [pattern(evidence) for pattern in PATTERNS]
    return [hint for hint in found if hint is not None]
