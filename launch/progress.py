"""The launcher's display: follows the run record and shows loss, tokens per second and time left."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from xtrain.launch.files import new_text


class RecordTail:
    """Reads the lines that have been added to a record since the last call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new_steps(self) -> list[dict[str, Any]]:
        """Complete step lines since the last call."""
        text, self._offset = new_text(self.path, self._offset)
        entries = [json.loads(line) for line in text.splitlines() if line]
        return [entry for entry in entries if entry["type"] == "step"]


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressDisplay:
    """A bar on a terminal; a line every few seconds elsewhere."""

    def __init__(
        self, console: Console, total: int | None, title: str, seconds_between_lines: float = 10.0
    ) -> None:
        self.console = console
        self.total = total
        self.seconds_between_lines = seconds_between_lines
        self._recent: deque[dict[str, Any]] = deque(maxlen=20)
        self._last_line = time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._progress.add_task(title, total=total, figures="starting")
            self._progress.start()

    def figures(self) -> str:
        """Loss, rate and time left, from the last twenty steps."""
        last, seconds = self._recent[-1], sum(step["seconds"] for step in self._recent)
        parts = [f"loss {last['loss']:.4f}"]
        if "tokens" in last and seconds > 0:
            parts.append(f"{sum(step['tokens'] for step in self._recent) / seconds:,.0f} tokens/s")
        if self.total is not None:
            left = (self.total - last["step"]) * seconds / len(self._recent)
            parts.append(f"{_clock(left)} left")
        return " · ".join(parts)

    def update(self, steps: list[dict[str, Any]]) -> None:
        """Show steps that were just recorded."""
        if not steps:
            return
        self._recent.extend(steps)
        step = steps[-1]["step"]
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=self.figures())
        elif step == self.total or time.monotonic() - self._last_line >= self.seconds_between_lines:
            self._last_line = time.monotonic()
            of = f"/{self.total}" if self.total is not None else ""
            self.console.print(f"step {step}{of} · {self.figures()}", highlight=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
