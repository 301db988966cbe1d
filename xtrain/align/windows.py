"""Curves whose losses are means over windows of steps, beside curves of single steps, or of smaller windows.

The finer curve's losses are averaged over the windows that both can be averaged over; all other columns are those of a
window's last step. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from xtrain.align.record import UNKNOWN, Floats, Record, Steps
from xtrain.align.written import FLOAT32, common_steps
from xtrain.base.errors import RecordError

_AVERAGED = "loss"
"""The column that windows are means of, and the beginning of the names of others (losses of ranks)."""


@dataclass(frozen=True)
class Windows:
    """Windows of steps: each begins after the step `begins` and ends with the step `ends`; ascending."""

    begins: Steps
    ends: Steps

    @property
    def length(self) -> int:
        """Steps in most of them."""
        return int(np.median(self.ends - self.begins))


@dataclass(frozen=True)
class Matched:
    """Two records whose rows are of the same steps, or windows of steps.

    Attributes:
        windows: what was averaged over; None: the records are as they were.
        notes: what was done, a sentence each.
        left_out: what could not be, a sentence each.
    """

    reference: Record
    candidate: Record
    windows: Windows | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def begins_of(record: Record) -> Steps:
    """After which step each row begins; UNKNOWN where nobody knows."""
    return record.step - 1 if record.begins is None else record.begins


def first_step(record: Record) -> int:
    """The first step that a record tells of: the first one of its first window."""
    begin = int(begins_of(record)[0])
    return int(record.step[0]) if begin == UNKNOWN else begin + 1


def tiling(begins: Steps, ends: Steps, windows: Windows) -> tuple[Steps, Steps]:
    """(first row, last row) of those that make up each window without a gap; (0, -1) where they don't."""
    rows = len(ends)
    first = np.searchsorted(ends, windows.begins, side="right")
    last = np.minimum(np.searchsorted(ends, windows.ends), rows - 1)
    there = np.minimum(first, rows - 1)
    broken = np.concatenate([[0], np.cumsum(begins[1:] != ends[:-1])])
    whole = (first <= last) & (begins[there] == windows.begins) & (ends[last] == windows.ends)
    whole &= broken[last] == broken[there]
    return np.where(whole, first, 0), np.where(whole, last, -1)


def means(values: Floats, lengths: Steps, first: Steps, last: Steps) -> Floats:
    """Means of rows first[i] to last[i], ascending and apart, weighted by length; a single row as it is.

    Args:
        values: shape (..., rows).
        lengths: steps of each row.

    Returns:
        Shape (..., windows).
    """
    bounds = np.stack([first, last + 1], axis=1).ravel()
    padded = np.concatenate([values * lengths, np.zeros((*values.shape[:-1], 1))], axis=-1)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.add.reduceat(padded, bounds, axis=-1)[..., ::2]
        steps = np.add.reduceat(np.append(lengths, 0), bounds)[::2]
        return np.asarray(np.where(first == last, values[..., first], sums / steps))


def _over(record: Record, windows: Windows) -> Record:
    """A record averaged over windows, each of which its rows make up."""
    begins = begins_of(record)
    first, last = tiling(begins, record.step, windows)
    lengths = record.step - begins
    coarse = record.take(last)
    several = first < last
    for name, values in record.columns.items():
        if name.partition("_by_rank")[0] == _AVERAGED:
            coarse.columns[name] = means(values, lengths, first, last)
            half = record.rounding.get(name, np.zeros(len(values)))
            # The other tool has added its losses up in float32.
            size = np.nan_to_num(np.abs(coarse.columns[name]), nan=0.0, posinf=0.0)
            adding = np.where(several, (windows.ends - windows.begins) * FLOAT32 * size, 0.0)
            coarse.rounding[name] = means(half, lengths, first, last) + adding
    return replace(coarse, begins=windows.begins)


def _known(record: Record) -> Record:
    """Without the rows of which nobody knows where they begin."""
    return record.take(begins_of(record) != UNKNOWN)


def _shared(reference: Record, candidate: Record) -> tuple[Windows, int]:
    """(windows that the rows of both make up, how many more could have been and lack steps)."""
    known = _known(reference), _known(candidate)
    ours = np.union1d(begins_of(known[0]), known[0].step)
    theirs = np.union1d(begins_of(known[1]), known[1].step)
    both = np.intersect1d(ours, theirs)
    if len(both) < 2:
        return Windows(both[:0], both[:0]), 0
    possible = Windows(both[:-1], both[1:])
    made = np.ones(len(both) - 1, bool)
    for record in known:
        if not len(record.step):
            made[:] = False
            break
        made &= tiling(begins_of(record), record.step, possible)[1] >= 0
    return Windows(possible.begins[made], possible.ends[made]), int((~made).sum())


def _described(record: Record) -> str:
    """ "means over windows of 5 steps", or "single steps" and how far they are apart."""
    if record.begins is None:
        apart = int(np.median(np.diff(record.step))) if len(record.step) > 1 else 1
        return "losses of single steps" + (f", {apart} apart" if apart > 1 else "")
    lengths = (record.step - record.begins)[record.begins != UNKNOWN]
    many = (
        f"windows of {int(np.median(lengths))} steps"
        if len(lengths)
        else "windows that begin nobody knows where"
    )
    return f"means over {many} (the first ends at step {record.step[0]})"


def _unmatched(reference: Record, candidate: Record) -> RecordError:
    return RecordError(
        f"{reference.path} has {_described(reference)}, and {candidate.path} has {_described(candidate)}: no "
        "window can be made of both; log every step in one of the two (logging_steps 1, --log-interval 1), or the same "
        "windows in both"
    )


def _same_windows(reference: Record, candidate: Record) -> Matched | None:
    """Both as they are, if their rows are of the same windows; without rows of which only one is known to begin."""
    step, mine, its = common_steps(reference.step, candidate.step)
    if not len(step):
        return None
    ours, theirs = begins_of(reference)[mine], begins_of(candidate)[its]
    vague = (ours == UNKNOWN) != (theirs == UNKNOWN)
    if (ours != theirs)[~vague].any() or vague.all():
        return None
    notes = []
    if vague.any():
        away = step[vague]
        reference = reference.take(~np.isin(reference.step, away))
        candidate = candidate.take(~np.isin(candidate.step, away))
        notes.append(
            f"step {away[0]} was not compared: one of the files does not say where its window begins"
        )
    return Matched(reference, candidate, notes=notes)


def match(reference: Record, candidate: Record) -> Matched:
    """Bring two records to the same windows, if one of them has any.

    Raises:
        RecordError: no window can be made of the rows of both.
    """
    if reference.begins is None and candidate.begins is None:
        return Matched(reference, candidate)
    if (same := _same_windows(reference, candidate)) is not None:
        return same
    windows, lacking = _shared(reference, candidate)
    if not len(windows.ends):
        raise _unmatched(reference, candidate)
    records, averaged = [], []
    for name, record in (("reference", _known(reference)), ("candidate", _known(candidate))):
        records.append(_over(record, windows))
        if (begins_of(record)[np.searchsorted(record.step, windows.ends)] != windows.begins).any():
            averaged.append(name)
    who = " and ".join(f"the {name}" for name in averaged)
    made = "that the other file's are means over" if len(averaged) == 1 else "that can be made of both"
    notes = [
        f"the losses of {who} are averaged over the windows of {windows.length} steps {made}; gradient norms and "
        "learning rates are those of the last step of a window"
    ]
    left_out = []
    if lacking:
        were = "window was" if lacking == 1 else "windows were"
        left_out.append(f"{lacking} {were} not compared: one of the files lacks steps of it")
    return Matched(records[0], records[1], windows, notes, left_out)
