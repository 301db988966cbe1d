"""`trainer_state.json` of Hugging Face's Trainer: `log_history` holds a row for every logging step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtrain.align.record import Record
from xtrain.align.sources.common import CurveBuilder, number
from xtrain.base.errors import RecordError


def read_trainer_state(path: Path, state: dict[str, Any], loss: str | None) -> Record:
    """The training rows of the history.

    Its losses are means over the steps since the row before (`logging_steps`, but for `logging_first_step`); gradient
    norms and learning rates are those of the row's step.

    Raises:
        RecordError: the history is not one, or has no training loss.
    """
    history = state["log_history"]
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise RecordError(f"{path}: log_history is not a list of rows")
    builder = CurveBuilder(path, "trainer_state.json", "step")
    every = number(state.get("logging_steps"))
    builder.windowed = True
    builder.usual = int(every) if every is not None and every == int(every) and every > 0 else None
    last: int | None = None
    for row in history:
        step = number(row.get("step"))
        if step is None:
            raise RecordError(f"{path}: a row of log_history has no step")
        # The summary at the end repeats the last step with the mean over the whole training.
        if "train_runtime" in row:
            continue
        begin = last if last is not None and last < step else None
        builder.add(step, {key: value for key, value in row.items() if key not in ("step", "epoch")}, begin)
        if "loss" in row or loss in row:
            last = int(step)
    return builder.build(loss)
