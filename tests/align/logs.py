"""Files as other tools write them, for the tests of comparing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


def trainer_state(
    path: Path, losses: Mapping[int, float], ends: list[int], every: int, first: int = 0
) -> Path:
    """Hugging Face's: a row at each of `ends`, with the mean since the one before (the first: since `first`)."""
    history, begin = [], first
    for end in ends:
        mean = np.float32(np.mean([losses[step] for step in range(begin + 1, end + 1)]))
        row = {
            "step": end,
            "loss": round(float(mean), 4),
            "grad_norm": 1.0 + end / 7,
            "learning_rate": 1e-3 / end,
        }
        history.append(row)
        begin = end
    path.write_text(json.dumps({"log_history": history, "logging_steps": every}))
    return path


def megatron_log(
    path: Path,
    losses: Mapping[int, float],
    interval: int,
    skipped: Callable[[int], bool] = lambda step: False,
    first: int = 0,
) -> Path:
    """A log whose lines tell of `interval` iterations each, without those that were skipped."""
    lines = ["> building model ..."]
    for end in range(first + interval, max(losses) + 1, interval):
        steps = range(end - interval + 1, end + 1)
        kept = [losses[step] for step in steps if not skipped(step)]
        loss = f" lm loss: {np.mean(kept):.6E} |" if kept else ""
        skips = f"number of skipped iterations: {interval - len(kept):3d} |"
        rate, norm = f"learning rate: {1e-3 / end:.3E} |", f"grad norm: {1.0 + end / 7:.3f} |"
        head = f" iteration {end:8d}/ {max(losses):8d} | consumed samples: {end * 32:12d} |"
        lines.append(f"{head} {rate}{loss} {norm} {skips}")
    path.write_text("\n".join(lines) + "\n")
    return path


def table(path: Path, columns: Mapping[str, list[str]]) -> Path:
    """A CSV file of columns as text."""
    rows = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(rows) + "\n")
    return path
