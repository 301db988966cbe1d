"""What two curves may differ by because of how their numbers were written: rounded, or cut off. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xtrain.align.record import Floats, Record, Steps

EPS = 2.0**-52
FLOAT32 = 2.0**-24
"""Half a unit in the last place of a float32, relative to the number: at most so much rounding to one changes."""
ENOUGH_ROWS = 20
"""So many differences in a row that all fit to digits that were cut off are no accident, whatever comes later."""
COLUMNS = ("loss", "grad_norm", "lr")
"""The columns that are looked at for digits that were cut off."""


def common_steps(one: Steps, other: Steps) -> tuple[Steps, Steps, Steps]:
    """(steps that both have, their rows in `one`, their rows in `other`)."""
    steps, mine, its = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    return steps, mine, its


def rounding(reference: Record, candidate: Record, column: str, mine: Steps, its: Steps) -> Floats | float:
    """How far values of a column may be apart because of the digits that were written, for each pair of rows; 0.0
    where both are exact."""
    found: Floats | float = 0.0
    for record, rows in ((reference, mine), (candidate, its)):
        if column in record.rounding:
            found = found + record.rounding[column][rows]
    return found


def _cut_off(written: Floats, other: Floats, half: Floats, slack: Floats | float) -> bool:
    """Whether `written` is `other` with its last digits cut off: nearer to zero by less than a unit, never farther,
    and by more than half a unit somewhere. Up to the first step at which it is not, if that is far enough."""
    known = np.isfinite(written) & np.isfinite(other) & (half > 0)
    less = (np.abs(other) - np.abs(written))[known]
    few = (slack + 4 * EPS * np.abs(other))[known]
    fits = (less >= -few) & (less <= 2 * half[known] + few)
    stretch = len(fits) if fits.all() else int(np.argmin(fits))
    if stretch < len(fits) and stretch < ENOUGH_ROWS:
        return False
    return bool((less > half[known] + few)[:stretch].any())


def allow_cutting(reference: Record, candidate: Record) -> tuple[Record, Record, list[str]]:
    """(both records, notes): a whole unit of the last digit is allowed where numbers look cut off, not rounded."""
    _, mine, its = common_steps(reference.step, candidate.step)
    records, notes = [reference, candidate], []
    for which, name in enumerate(("reference", "candidate")):
        record, other = records[which], records[1 - which]
        rows, theirs = (mine, its) if which == 0 else (its, mine)
        cut = []
        for column in COLUMNS:
            half = record.rounding.get(column)
            if half is None:
                continue
            slack = other.rounding[column][theirs] if column in other.rounding else 0.0
            if _cut_off(record.column(column)[rows], other.column(column)[theirs], half[rows], slack):
                cut.append(column)
        if cut:
            records[which] = replace(
                record,
                rounding={**record.rounding, **{column: 2 * record.rounding[column] for column in cut}},
            )
            notes.append(
                f"the {name}: its numbers look cut off, not rounded ({', '.join(cut)}): a whole unit of the last digit "
                "is allowed"
            )
    return records[0], records[1], notes
