"""Records for the tests of comparing: written to files, or made in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from xtrain.align.record import Record


def write(path: Path, losses: dict[int, float], **header: Any) -> Path:
    """A record file of version 1, as a plain run has it."""
    lines: list[dict[str, Any]] = [{"type": "header", "version": 1, **header}]
    lines += [
        {"type": "step", "step": step, "loss": loss, "loss_hex": loss.hex()} for step, loss in losses.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def make(losses: dict[int, float], headers: list[dict[str, Any]] | None = None, **columns: Any) -> Record:
    """A record in memory; further columns as lists in the order of the steps."""
    found = {name: np.array(values, np.float64) for name, values in columns.items()}
    found["loss"] = np.array(list(losses.values()), np.float64)
    return Record(Path("x"), np.array(list(losses), np.int64), found, headers or [{}])
