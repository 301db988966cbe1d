"""What the readers of other tools' files share: numbers as text, and from loose cells to a Record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xtrain.align.record import UNKNOWN, ColumnBuilder, Floats, Record, Steps
from xtrain.align.sources.digits import digits_of, half_units, set_by_hand
from xtrain.align.sources.names import find_loss, find_others, unit_of
from xtrain.align.written import FLOAT32
from xtrain.base.errors import RecordError


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


FEWEST = 3
"""So many rows say by themselves over how many steps their losses are means."""


def usual_length(step: Steps, begins: Steps) -> int | None:
    """Steps in most of the windows whose beginning is known; None: none is."""
    lengths = (step - begins)[begins != UNKNOWN]
    return int(np.median(lengths)) if len(lengths) else None


def _windows(step: Steps, begins: Steps, usual: int | None) -> Steps | None:
    """Where the windows begin; None when every loss is of a single step.

    The first one of a run begins at 0: when it is no longer than windows usually are.
    """
    told = [length for length in (usual, usual_length(step, begins)) if length is not None]
    usual = max(told, default=None)
    begins = begins.copy()
    if begins[0] == UNKNOWN and (step[0] == 1 or (usual is not None and 0 < step[0] <= usual)):
        begins[0] = 0
    if usual == 1:
        begins[begins == UNKNOWN] = step[begins == UNKNOWN] - 1
    return None if (step - begins == 1).all() else begins


class CurveBuilder:
    """Collects cells by (step, name of column), each with how it was written, and builds the Record.

    Attributes:
        notes: what was odd about the file.
        axis: name of the column that all columns have their steps from; None: each curve has its own.
        windowed: whether losses are means since the row before (rows are added with `begin`).
        usual: steps in a window as the file says; None: it does not say.
        float32: whether numbers were written as float32.
    """

    def __init__(self, path: Path, kind: str, axis: str | None = None) -> None:
        self.path, self.kind, self.axis = path, kind, axis
        self.notes: list[str] = []
        self.windowed = self.float32 = False
        self.usual: int | None = None
        self._rows: list[tuple[int, dict[str, float], int | None]] = []
        self._texts: dict[str, list[str]] = {}

    def add(self, step: float, values: Mapping[str, Any], begin: int | None = None) -> None:
        """A row; cells without a number are left out.

        Args:
            begin: the step after which the row's window begins, if that is known.

        Raises:
            RecordError: the step is no whole number.
        """
        if not math.isfinite(step) or step != int(step) or abs(step) >= 2**62:
            raise RecordError(f"{self.path}: {step!r} is not the number of a step")
        numbers: dict[str, float] = {}
        for name, text in values.items():
            value = number(text)
            if value is not None:
                numbers[name] = value
                # Numbers that were read as such (TensorBoard's) have no digits of their own.
                written = text if isinstance(text, str) else getattr(text, "text", None)
                if written is not None:
                    self._texts.setdefault(name, []).append(written)
        if numbers:
            self._rows.append((int(step), numbers, begin))

    def build(self, loss: str | None) -> Record:
        """The record, of the rows that have a loss.

        Raises:
            RecordError: no column is the loss, or it has no row.
        """
        names = {name for _, numbers, _ in self._rows for name in numbers}
        chosen = find_loss(names, loss, self.path)
        unit = unit_of(chosen, self.axis, self.path.stem)
        others = find_others(names - {chosen}, unit, self.axis is not None)
        steps, found, begins, notes = self._columns(chosen, others)
        if chosen.strip().lower() != "loss":
            notes.append(f"its loss is column {chosen!r}")
        if begins is not None:
            found_length = usual_length(steps, begins)
            length = self.usual if len(steps) < FEWEST and self.usual is not None else found_length
            over = "windows that nobody knows the beginning of" if length is None else f"{length} steps"
            notes.append(f"its losses are means over {over}")
        return Record(
            self.path,
            steps,
            found,
            kind=self.kind,
            rounding=self._rounding(found, {"loss": chosen, **others}),
            begins=begins,
            unit=unit,
            notes=[*self.notes, *notes],
        )

    def _columns(
        self, chosen: str, others: dict[str, str]
    ) -> tuple[Steps, dict[str, Floats], Steps | None, list[str]]:
        """(steps, columns under xtrain's names, where windows begin, notes)."""
        columns, rows = ColumnBuilder(), 0
        by_step: dict[int, dict[str, float]] = {}
        for step, numbers, begin in self._rows:
            line = {ours: numbers[theirs] for ours, theirs in others.items() if theirs in numbers}
            if chosen in numbers:
                columns.add(step, {**line, "loss": numbers[chosen], "begin": begin})
                rows += 1
            elif line:  # a tool that writes each value on a row of its own
                by_step.setdefault(step, {}).update(line)
        if not rows:
            raise RecordError(f"{self.path} has no row with a number in column {chosen!r}")
        steps, found, notes = columns.build()
        for ours in others:
            column = found.setdefault(ours, np.full(len(steps), np.nan))
            for row, step in enumerate(steps.tolist()):
                if math.isnan(column[row]) and ours in by_step.get(step, {}):
                    column[row] = by_step[step][ours]
        known = found.pop("begin", np.full(len(steps), np.nan))
        if not self.windowed:
            return steps, found, None, notes
        begins = np.where(np.isnan(known), UNKNOWN, np.nan_to_num(known).astype(np.int64))
        return steps, found, _windows(steps, begins, self.usual), notes

    def _rounding(self, found: dict[str, Floats], names: dict[str, str]) -> dict[str, Floats]:
        """By column, how far its numbers may be from those that were rounded to them."""
        rounding = {}
        for ours, theirs in names.items():
            values = found[ours]
            digits = digits_of(self._texts.get(theirs, ()))
            if self.float32:
                rounding[ours] = FLOAT32 * np.abs(np.where(np.isfinite(values), values, 0.0))
            elif digits is not None and not (ours == "lr" and set_by_hand(values, digits)):
                rounding[ours] = half_units(values, digits)
        return rounding
