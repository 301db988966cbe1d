"""The run record, read into columns: a JSON Lines file of headers, steps and module statistics. Imports no torch.

The format is described in docs/record.md. Curves of other tools become the same `Record` in xtrain.align.sources.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xtrain.align.module_table import OPTIONAL, PHASES, STATISTICS, ModuleTable
from xtrain.base.errors import RecordError

VERSION = 2
READABLE = (1, 2)

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]
UNKNOWN = int(np.iinfo(np.int64).min)
"""In `Record.begins`: nobody knows where the window begins."""

_HEADER_START = b'{"type": "header"'


@dataclass
class Record:
    """A curve with what is known of its run.

    Attributes:
        step: numbers of the steps, ascending, each once.
        columns: float64 by name, one value a step, NaN where the step has none: `loss`, `grad_norm`, `lr`,
            `loss_scale`, `applied`, `tokens`, `loss_by_rank.0`, ... A list becomes `name.0`, `name.1`, ...,
            a dictionary `name.key`, ...; and the first element of `lr` is `lr`.
        headers: in the order in which processes started writing.
        modules: statistics by phase and module; None without.
        kind: what sort of file it was.
        rounding: by name of a column, how far each of its numbers as written may be from the number as computed,
            in the column's own unit; columns that are not there are exact.
        begins: of each row the step after which the window begins that its loss is the mean of (the window ends with
            the row's step; other columns are those of that step), or UNKNOWN; None: losses of single steps.
        unit: what `step` counts: "steps", "samples" or "tokens".
        notes: what was odd about the file, one sentence each.
        doubts: what makes it doubtful that these are the steps of one run, one sentence each.
    """

    path: Path
    step: Steps
    columns: dict[str, Floats]
    headers: list[dict[str, Any]] = field(default_factory=list)
    modules: ModuleTable | None = None
    kind: str = "xtrain record"
    rounding: dict[str, Floats] = field(default_factory=dict)
    begins: Steps | None = None
    unit: str = "steps"
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    @property
    def header(self) -> dict[str, Any]:
        """The first header; empty for files of other tools."""
        return self.headers[0] if self.headers else {}

    @property
    def loss(self) -> Floats:
        """Loss of each step."""
        return self.column("loss")

    def column(self, name: str) -> Floats:
        """A column; all NaN when the record has none of that name."""
        found = self.columns.get(name)
        return np.full(len(self.step), np.nan) if found is None else found

    def take(self, rows: Any) -> Record:
        """The record with those rows only: a mask, or their numbers."""
        return replace(
            self,
            step=self.step[rows],
            columns={name: values[rows] for name, values in self.columns.items()},
            rounding={name: values[rows] for name, values in self.rounding.items()},
            begins=None if self.begins is None else self.begins[rows],
        )

    def known(self, name: str) -> Record:
        """The record without the steps at which a column has no value."""
        return self.take(~np.isnan(self.column(name)))

    def shifted(self, by: int) -> Record:
        """The record with `by` added to all numbers of steps: rows, windows, restarts and module statistics."""
        if not by:
            return self
        begins, modules = self.begins, self.modules
        if begins is not None:
            begins = np.where(begins == UNKNOWN, UNKNOWN, begins + by)
        if modules is not None:
            modules = replace(modules, steps={phase: steps + by for phase, steps in modules.steps.items()})
        headers = [
            {**header, "from_step": int(header["from_step"]) + by} if "from_step" in header else header
            for header in self.headers
        ]
        return replace(self, step=self.step + by, begins=begins, modules=modules, headers=headers)

    def losses(self) -> dict[int, float]:
        """Loss by step number, exact."""
        return dict(zip(self.step.tolist(), self.loss.tolist(), strict=True))

    def skipped(self) -> Steps:
        """Steps whose update was skipped, because gradients were not finite."""
        return self.step[self.column("applied") == 0]

    def restarts(self) -> list[int]:
        """Steps from which a later process continued."""
        return [int(header["from_step"]) for header in self.headers[1:] if "from_step" in header]


class ColumnBuilder:
    """Collects numbers by step and name, in any order; of two lines for one step the later counts."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._cells: dict[str, tuple[array[int], array[float]]] = {}
        self._cuts: list[tuple[int, int]] = []

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Add a line; values that are no numbers are left out."""
        row = len(self._steps)
        self._steps.append(step)
        for name, value in values.items():
            if isinstance(value, list):
                for index, item in enumerate(value):
                    self._put(row, "lr" if name == "lr" and index == 0 else f"{name}.{index}", item)
            elif isinstance(value, dict):
                for key, item in value.items():
                    self._put(row, f"{name}.{key}", item)
            else:
                self._put(row, name, value)

    def _put(self, row: int, name: str, value: Any) -> None:
        if isinstance(value, int | float):
            cell = self._cells.get(name)
            if cell is None:
                cell = self._cells[name] = (array("q"), array("d"))
            cell[0].append(row)
            cell[1].append(value)

    def forget_after(self, step: int) -> None:
        """A process starts that continues from `step`: what an earlier one wrote of later steps is void."""
        self._cuts.append((len(self._steps), step))

    def build(self) -> tuple[Steps, dict[str, Floats], list[str]]:
        """(steps, columns, notes)."""
        raw = np.array(self._steps, np.int64)
        valid = np.ones(len(raw), bool)
        for position, step in self._cuts:
            valid[:position] &= raw[:position] <= step
        rows = np.flatnonzero(valid)
        # The last line of each step: unique() keeps the first one, so it is given the lines backwards.
        steps, first = np.unique(raw[rows][::-1], return_index=True)
        chosen = rows[::-1][first]
        notes = []
        again = len(rows) - len(steps)
        if again:
            notes.append(
                f"{again} step{'s stand' if again > 1 else ' stands'} in it twice: the later line counts"
            )
        if len(rows) > 1 and (np.diff(raw[rows]) < 0).any() and not again:
            notes.append("its steps were not in order")
        columns = {}
        for name, (positions, values) in self._cells.items():
            column = np.full(len(raw), np.nan)
            column[np.array(positions, np.int64)] = np.array(values, np.float64)
            columns[name] = column[chosen]
        return steps, columns, notes


class _ModuleBuilder:
    """Collects the lines of module statistics, as float32."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._places: list[int] | None = (
            None  # of the names in the lines that follow, if they stand in another order
        )
        self._steps: dict[str, array[int]] = {}
        self._values: dict[tuple[str, str], array[float]] = {}

    def set_names(self, names: list[str]) -> bool:
        """Returns whether statistics of other modules were dropped for these."""
        changed = bool(self._steps) and sorted(names) != sorted(self.names)
        if changed:
            self._steps.clear()
            self._values.clear()
        if changed or not self._steps:
            self.names = [str(name) for name in names]
        place = {name: index for index, name in enumerate(names)}
        self._places = None if names == self.names else [place[name] for name in self.names]
        return changed

    def add(self, entry: dict[str, Any]) -> None:
        phase, width = entry["phase"], len(self.names)
        if phase not in PHASES:
            return  # of a later version; what is known is read
        step, found = int(entry["step"]), []
        for statistic in STATISTICS:
            values = entry.get(statistic, [None] * width) if statistic in OPTIONAL else entry[statistic]
            if len(values) != width:
                raise ValueError(f"{len(values)} values of {statistic} for {width} modules")
            if self._places is not None:
                values = [values[place] for place in self._places]
            try:
                found.append(array("f", values))
            except TypeError:  # null: the module did not run
                found.append(array("f", [np.nan if value is None else value for value in values]))
        # Nothing of a line that is damaged.
        self._steps.setdefault(phase, array("q")).append(step)
        for statistic, singles in zip(STATISTICS, found, strict=True):
            self._values.setdefault((phase, statistic), array("f")).extend(singles)

    def build(self) -> ModuleTable | None:
        if not self._steps:
            return None
        table = ModuleTable(self.names)
        for phase, raw in self._steps.items():
            steps, last = np.unique(np.array(raw, np.int64)[::-1], return_index=True)
            rows = len(raw) - 1 - last
            whole = bool(np.array_equal(rows, np.arange(len(raw))))
            for statistic in STATISTICS:
                flat = np.frombuffer(self._values.pop((phase, statistic)), np.float32)
                values = flat.reshape(len(raw), len(self.names))
                if statistic in OPTIONAL and np.isnan(values).all():
                    continue
                table.put(phase, statistic, steps, values if whole else values[rows])
        return table


def record_file(path: str | Path) -> Path:
    """The record that a path means: the file itself, or `metrics.jsonl` in a run folder."""
    path = Path(path)
    return path / "metrics.jsonl" if path.is_dir() else path


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise RecordError(f"{file} does not exist: pass a run folder or a metrics.jsonl") from None
    except OSError as error:
        raise RecordError(f"{file} cannot be read as a run record: {error}") from None


class _Reader:
    """Takes the lines of one file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.headers: list[dict[str, Any]] = []
        self.columns = ColumnBuilder()
        self.modules = _ModuleBuilder()
        self.notes: list[str] = []

    def take(self, line: bytes) -> None:
        """One line.

        Raises:
            ValueError, KeyError, TypeError: it is not a record's.
            RecordError: the record is of a version that is not known.
        """
        entry = json.loads(line)
        kind = entry["type"]
        if kind == "step":
            self._step(entry)
        elif kind == "modules":
            self.modules.add(entry)
        elif kind == "names":
            if self.modules.set_names(entry["modules"]):
                self.notes.append("its modules change: the statistics before are left out")
        elif kind == "header":
            if entry.get("version") not in READABLE:
                readable = " and ".join(map(str, READABLE))
                raise RecordError(
                    f"{self.file} has record version {entry.get('version')}, this xtrain reads {readable}"
                )
            if self.headers:
                self.columns.forget_after(int(entry.get("from_step", 0)))
            if lost := entry.get("lost_steps"):
                self.notes.append(f"steps {lost[0]} to {lost[1]} could not be written")
            self.headers.append(entry)

    def _step(self, entry: dict[str, Any]) -> None:
        step = entry.pop("step")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"step {step!r} is not a number of a step")
        exact = entry.pop("loss_hex", None)
        if exact is not None:
            entry["loss"] = float.fromhex(exact)
        self.columns.add(step, entry)


def read_record(path: str | Path) -> Record:
    """Read a record; lines that were cut off by a crash are left out.

    Raises:
        RecordError: the file is missing, is not a record, or has a damaged line that is not the last.
    """
    file = record_file(path)
    reader = _Reader(file)
    damaged: str | None = None
    for number, line in _lines(file):
        if damaged is not None and not line.startswith(_HEADER_START):
            raise RecordError(f"{file} is not a run record: {damaged}")
        damaged = None
        try:
            reader.take(line)
        except RecordError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            damaged = f"line {number}: {error}"
    if not reader.headers:
        raise RecordError(f"{file} is not a run record: {damaged or 'it has no header line'}")
    if damaged is not None:
        reader.notes.append("its last line was cut off")
    steps, columns, doubts = reader.columns.build()  # the recorder writes each step once, and in order
    modules = reader.modules.build()
    return Record(file, steps, columns, reader.headers, modules, notes=reader.notes, doubts=doubts)
