"""The run record: a JSON Lines file with a header and one line per optimizer step. Imports no torch.

Format version 1 (docs/record.md):

- `{"type": "header", "version": 1, ...}` whenever a process starts writing;
- `{"type": "step", "step": n, "loss": x, "loss_hex": "0x1.8p+1", "grad_norm": x, "lr": [x], ...}`.

A run that is resumed appends to its record; of two lines for one step the later one counts. A line that
a crash cut off stands at the end, or before the header of the run that was resumed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xtrain.errors import RecordError

VERSION = 1


@dataclass
class Record:
    """A record that was read: headers in order, and steps by step number."""

    path: Path
    headers: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)

    def losses(self) -> dict[int, float]:
        """Loss by step number, exact."""
        return {step: float.fromhex(line["loss_hex"]) for step, line in sorted(self.steps.items())}


def record_file(path: str | Path) -> Path:
    """The record that a path means: the file itself, or `metrics.jsonl` in a run folder."""
    path = Path(path)
    return path / "metrics.jsonl" if path.is_dir() else path


def read_record(path: str | Path) -> Record:
    """Read a record; lines that were cut off by a crash are left out.

    Raises:
        RecordError: the file is missing, is not a record, or has a damaged line that is not the last.
    """
    file = record_file(path)
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise RecordError(f"{file} does not exist: pass a run folder or a metrics.jsonl") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{file} cannot be read as a run record: {error}") from None
    record = Record(file)
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            if entry["type"] == "header":
                record.headers.append(entry)
            elif entry["type"] == "step":
                record.steps[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError) as error:
            follower = next((later for later in lines[number:] if later), None)
            if follower is None or follower.startswith('{"type": "header"'):
                continue
            raise RecordError(f"{file} is not a run record: line {number}: {error}") from None
    if record.headers and record.headers[0].get("version") != VERSION:
        raise RecordError(
            f"{file} has record version {record.headers[0].get('version')}, this xtrain reads {VERSION}"
        )
    if not record.headers:
        raise RecordError(f"{file} is not a run record: it has no header line")
    return record
