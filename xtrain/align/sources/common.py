"""What the readers of other tools' files share: numbers as text, and from loose cells to a Record."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xtrain.align.record import ColumnBuilder, Floats, Record
from xtrain.align.sources.names import find_loss, find_others
from xtrain.base.errors import RecordError

_DECIMAL = re.compile(r"^\s*[+-]?(\d+)(?:\.(\d*))?(?:[eE]([+-]?\d+))?\s*$")
ENOUGH_DIGITS = 15


def half_digit(text: str) -> float | None:
    """Half a unit of the last digit of a decimal number; 0 where it has all digits of a float64.

    None where nothing can be said: a whole number, or no number.
    """
    match = _DECIMAL.match(text)
    if match is None:
        return None
    whole, fraction, exponent = match[1], match[2] or "", int(match[3] or 0)
    if not fraction or abs(exponent) > 300:
        return None
    if len((whole + fraction).lstrip("0")) >= ENOUGH_DIGITS:
        return 0.0
    return float(0.5 * 10.0 ** (exponent - len(fraction)))


def rounding_of(texts: list[str]) -> Floats | None:
    """How far each of a column's numbers may be from what was rounded to it; None: not at all.

    Tools that write a fixed number of decimals leave trailing zeros out, or don't: the number with the most
    decimals speaks for all. In scientific notation each number speaks for itself.
    """
    halves = [half_digit(text) for text in texts]
    if any("e" in text.lower() for text in texts):
        found = np.array([half or 0.0 for half in halves])
    else:
        found = np.full(len(texts), min((half for half in halves if half is not None), default=0.0))
    return found if (found > 0).any() else None


def number(text: Any) -> float | None:
    """A cell's number; None for an empty cell or one that is text."""
    if isinstance(text, bool) or text is None:
        return None
    if isinstance(text, int | float):
        return float(text)
    try:
        return float(str(text).strip())
    except ValueError:
        return None


class CurveBuilder:
    """Collects cells by (step, name of column), each with how it was rounded, and builds the Record."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, kind
        self.notes: list[str] = []
        self._rows: list[tuple[int, dict[str, float]]] = []
        self._texts: list[dict[str, str]] = []

    def add(self, step: float, values: Mapping[str, Any]) -> None:
        """A row; cells without a number are left out.

        Raises:
            RecordError: the step is no whole number.
        """
        if not math.isfinite(step) or step != int(step) or abs(step) >= 2**62:
            raise RecordError(f"{self.path}: {step!r} is not the number of a step")
        numbers: dict[str, float] = {}
        rounded: dict[str, str] = {}
        for name, text in values.items():
            value = number(text)
            if value is not None:
                numbers[name] = value
                # Numbers that were read as such (TensorBoard's) have all their digits.
                rounded[name] = text if isinstance(text, str) else getattr(text, "text", "")
        if numbers:
            self._rows.append((int(step), numbers))
            self._texts.append(rounded)

    def build(self, loss: str | None) -> Record:
        """The record, of the rows that have a loss.

        Raises:
            RecordError: no column is the loss, or it has no row.
        """
        names = {name for _, numbers in self._rows for name in numbers}
        chosen = find_loss(names, loss, self.path)
        others = find_others(names - {chosen})
        columns = ColumnBuilder()
        texts: list[str] = []
        by_step: dict[int, dict[str, float]] = {}
        for (step, numbers), rounded in zip(self._rows, self._texts, strict=True):
            line = {ours: numbers[theirs] for ours, theirs in others.items() if theirs in numbers}
            if chosen in numbers:
                columns.add(step, {**line, "loss": numbers[chosen], "row": len(texts)})
                texts.append(rounded[chosen])
            elif line:  # a tool that writes each value on a row of its own
                by_step.setdefault(step, {}).update(line)
        if not texts:
            raise RecordError(f"{self.path} has no row with a number in column {chosen!r}")
        steps, found, notes = columns.build()
        for ours in others:
            column = found.setdefault(ours, np.full(len(steps), np.nan))
            for row, step in enumerate(steps.tolist()):
                if math.isnan(column[row]) and ours in by_step.get(step, {}):
                    column[row] = by_step[step][ours]
        rounding, rows = rounding_of(texts), found.pop("row").astype(np.int64)
        if chosen.strip().lower() != "loss":
            notes.append(f"its loss is column {chosen!r}")
        record = Record(self.path, steps, found, kind=self.kind, notes=[*self.notes, *notes])
        record.rounding = None if rounding is None else rounding[rows]
        return record
