"""msProbe's statistics dumps (mindstudio-probe): `step<N>/rank<R>/dump.json`, levels L0 and mix.

They hold maximum, minimum, mean and norm of the inputs and outputs of modules, and no loss: module by module
they can be compared, curves can't. Format: docs/27.dump_json_instruction.md of msProbe.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from xtrain.align.module_table import ModuleTable
from xtrain.align.record import Record
from xtrain.base.errors import RecordError

_MODULE = re.compile(r"^(?:Module|Cell)\.(.+)\.[^.]+\.(forward|backward|parameters_grad)(?:\.\d+)?$")
_FOUND = ("mean", "rms", "max_abs", "nonfinite")
Figures = tuple[float, float, float, float]


def step_folders(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a dump, ascending."""
    found = [
        (int(match[1]), child)
        for child in folder.iterdir()
        if child.is_dir() and (match := re.fullmatch(r"step(\d+)", child.name))
    ]
    return sorted(found)


def is_dump(content: Any) -> bool:
    """Whether this is a dump.json."""
    return isinstance(content, dict) and isinstance(content.get("data"), dict) and "task" in content


def _leaves(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        if "Max" in value and "Norm" in value:
            yield value
        else:
            for item in value.values():
                yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _numbers(value: Any) -> Figures | None:
    """(mean, rms, largest magnitude, tensors that are not finite) over the tensors in one entry."""
    elements = total = squares = largest = broken = 0.0
    for leaf in _leaves(value):
        size = math.prod(leaf.get("shape") or [1])
        try:
            figures = [float(leaf[key]) for key in ("Max", "Min", "Mean", "Norm")]
        except (TypeError, ValueError, KeyError):  # null, or a boolean tensor
            continue
        if not size:
            continue
        elements += size
        total += figures[2] * size
        squares += figures[3] ** 2
        broken += not all(map(math.isfinite, figures))
        largest = float(np.max([largest, abs(figures[0]), abs(figures[1])]))  # NaN if one is
    if not elements:
        return None
    return total / elements, math.sqrt(squares / elements), largest, broken


def _entries(content: dict[str, Any]) -> dict[tuple[str, str], Figures]:
    """Numbers by (phase, module) of one dump.json; of several calls of a module the last counts."""
    found = {}
    for name, entry in content["data"].items():
        match = _MODULE.match(name)
        if match is None or not isinstance(entry, dict):
            continue  # an operator (level L1)
        module, kind = match[1], match[2]
        # In backward, `input` holds the gradients that came to the module's outputs.
        parts: dict[str, Any] = {"gradient": entry}
        if kind == "forward":
            parts = {"forward": entry.get("output"), "optimizer": entry.get("parameters")}
        elif kind == "backward":
            parts = {"backward": entry.get("input")}
        for phase, part in parts.items():
            if (numbers := _numbers(part)) is not None:
                found[phase, module] = numbers
    return found


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is not a dump.json of msProbe: {error}") from None
    if not is_dump(content):
        raise RecordError(f"{path} is not a dump.json of msProbe: it has no task and data")
    return dict(content)


def read_dump(path: Path) -> Record:
    """A dump folder (rank 0, or the lowest there is), or a single dump.json as step 0.

    The parameters in a dump are those before the update, and those here after it: step N's become step N - 1's.

    Raises:
        RecordError: there is no module statistic in it.
    """
    files = [(0, path)]
    if path.is_dir():
        files = []
        for step, folder in step_folders(path):
            dumps = sorted(folder.glob("*/dump.json")) or sorted(folder.glob("dump.json"))
            files += [(step, dumps[0])] if dumps else []
    by_step = {step: _entries(_load(file)) for step, file in files}
    names = list(dict.fromkeys(module for entries in by_step.values() for _, module in entries))
    if not names:
        raise RecordError(
            f"{path} has no statistics of modules: dump with level L0 or mix and task statistics or tensor"
        )
    table = ModuleTable(names)
    for phase in ("forward", "backward", "gradient", "optimizer"):
        steps = [step for step, entries in by_step.items() if any(key[0] == phase for key in entries)]
        if not steps:
            continue
        values = np.full((len(_FOUND), len(steps), len(names)), np.nan, np.float32)
        for row, step in enumerate(steps):
            for column, name in enumerate(names):
                values[:, row, column] = by_step[step].get((phase, name), (math.nan,) * len(_FOUND))
        shift = 1 if phase == "optimizer" else 0
        for statistic, array in zip(_FOUND, values, strict=True):
            table.put(phase, statistic, np.array(steps, np.int64) - shift, array)
    empty = np.empty(0, np.int64)
    notes = ["it has statistics of modules and no loss"]
    return Record(path, empty, {}, modules=table, kind="msProbe dump", notes=notes)
