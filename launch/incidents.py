"""What went wrong in a run, one line an incident, and which share of the time became steps that were kept."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xtrain.base.run_folder import ATTEMPTS, INCIDENTS, METRICS


@dataclass(frozen=True)
class Incident:
    """One thing that ended, or changed, a start of the run.

    Attributes:
        kind: "rank", "hang", "node", "agent", "checkpoint", "stop", "growth".
        start: number of the start of the run that it ended.
        cause: what happened, in words.
        node, rank: where, if that is known.
        step: the last one that was recorded.
        action: what the launcher did about it.
        lines: the rank's last ones.
    """

    kind: str
    start: int
    cause: str
    node: str | None = None
    rank: int | None = None
    step: int | None = None
    action: str = ""
    lines: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """Where and what, as one reads it."""
        where = " on " + self.node if self.node and self.node != "localhost" else ""
        if self.rank is not None:
            return f"rank {self.rank}{where} {self.cause}"
        return f"node {self.node} {self.cause}" if self.node else self.cause


def _append(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def write_incident(run_dir: Path, incident: Incident) -> None:
    """Add a line to the run's incidents.jsonl."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _append(run_dir / INCIDENTS, {"time": now, "what": incident.sentence(), **asdict(incident)})


def read_incidents(run_dir: Path) -> list[dict[str, Any]]:
    """All lines of the run's incidents.jsonl."""
    return _read(run_dir / INCIDENTS)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut off when the launcher was killed
    return found


class Clock:
    """Writes down when each start of the ranks began and how it ended; the time between two starts counts, too."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ATTEMPTS
        self.starts = sum("began" in entry for entry in _read(self._path))
        """Starts of this run so far, those of earlier launches included."""
        self._ended: float | None = None

    def begins(self) -> int:
        """The next start begins; its number."""
        self.starts += 1
        _append(self._path, {"start": self.starts, "began": self._ended or time.time()})
        return self.starts

    def ends(self, ranks: int, nodes: list[str], outcome: str) -> None:
        """The start that is running has ended."""
        self._ended = time.time()
        _append(
            self._path,
            {"start": self.starts, "ended": self._ended, "ranks": ranks, "nodes": nodes, "outcome": outcome},
        )


def last_step(run_dir: Path) -> int | None:
    """The last step of the run's record; None when there is none."""
    steps = _kept(run_dir)
    return max(steps) if steps else None


def _kept(run_dir: Path) -> dict[int, float]:
    """Seconds of every recorded step that no restart has taken back."""
    kept: dict[int, float] = {}
    for entry in _read(run_dir / METRICS):
        if entry.get("type") == "header" and "from_step" in entry:
            kept = {step: seconds for step, seconds in kept.items() if step <= entry["from_step"]}
        elif entry.get("type") == "step":
            kept[entry["step"]] = entry.get("seconds", 0.0)
    return kept


def goodput(run_dir: Path) -> tuple[float, float]:
    """(seconds of steps that were kept, seconds that the run took, restarts and waiting between them included)."""
    taken, began = 0.0, 0.0
    for entry in _read(run_dir / ATTEMPTS):
        # A start without an end was that of a launcher that was killed; the next one followed at once.
        now = entry["began"] if "began" in entry else entry["ended"]
        taken += now - began if began else 0.0
        began = entry.get("began", 0.0)
    return sum(_kept(run_dir).values()), taken
