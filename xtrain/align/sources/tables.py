"""CSV and TSV exports (W&B, TensorBoard's download, spreadsheets), and JSON Lines with one row a line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from xtrain.align.record import Record
from xtrain.align.sources.common import CurveBuilder, number
from xtrain.align.sources.names import find_step, unit_of
from xtrain.base.errors import RecordError


def delimiter_of(line: str) -> str | None:
    """What separates the cells of a header line that names steps; None when it is no such line."""
    for delimiter in (",", "\t", ";"):
        cells = next(csv.reader([line], delimiter=delimiter), [])
        if len(cells) > 1 and find_step(cells) is not None:
            return delimiter
    return None


def read_csv(path: Path, text: str, loss: str | None) -> Record:
    """A table with a header line.

    Raises:
        RecordError: no loss, or rows that do not fit the header.
    """
    first, _, _ = text.partition("\n")
    delimiter = delimiter_of(first)
    assert delimiter is not None, "detect.py asked"
    rows = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        header = next(rows)
        axis = find_step(header) or ""
        step_column = header.index(axis)
        builder = CurveBuilder(path, "CSV", axis)
        damaged: int | None = None
        for line, row in enumerate(rows, 2):
            if damaged is not None:
                raise RecordError(f"{path} line {damaged} does not fit its header of {len(header)} columns")
            if not row:
                continue
            step = number(row[step_column]) if len(row) == len(header) else None
            if step is None:
                damaged = line  # allowed of the last line: a crash may have cut it off
                continue
            cells = {
                name: cell
                for name, cell in zip(header, row, strict=True)
                if name != header[step_column] and not name.endswith(("__MIN", "__MAX"))
            }
            builder.add(step, cells)
    except csv.Error as error:
        raise RecordError(f"{path} is not a table: {error}") from None
    if damaged is not None:
        builder.notes.append("its last line was cut off")
    return builder.build(loss)


def read_json_lines(path: Path, text: str, loss: str | None) -> Record:
    """Objects one a line, each with a step: a W&B history, say."""
    lines = [line for line in text.splitlines() if line.strip()]
    builder = CurveBuilder(path, "JSON Lines")
    for index, line in enumerate(lines):
        try:
            row: Any = json.loads(line, parse_float=str)  # as text: its digits say how it was rounded
        except ValueError as error:
            if index == len(lines) - 1:
                builder.notes.append("its last line was cut off")
                continue
            raise RecordError(f"{path} line {index + 1} is not JSON: {error}") from None
        name = find_step(row) if isinstance(row, dict) else None
        step = number(row[name]) if name is not None else None
        if step is None:
            raise RecordError(f"{path} line {index + 1} has no step")
        builder.axis = builder.axis or name
        if unit_of("", name) != unit_of("", builder.axis):
            raise RecordError(f"{path} line {index + 1} counts {name!r}, and the first line {builder.axis!r}")
        builder.add(step, {key: value for key, value in row.items() if key != name})
    return builder.build(loss)
