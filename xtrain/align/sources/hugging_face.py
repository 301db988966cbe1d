"""`trainer_state.json` of Hugging Face's Trainer: `log_history` holds a row for every logging step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xtrain.align.record import Record
from xtrain.align.sources.common import CurveBuilder, number
from xtrain.base.errors import RecordError


def read_trainer_state(path: Path, state: dict[str, Any], loss: str | None) -> Record:
    """The training rows of the history.

    Its losses are means over `logging_steps` steps: two such files agree when they were logged alike.

    Raises:
        RecordError: the history is not one, or has no training loss.
    """
    history = state["log_history"]
    if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
        raise RecordError(f"{path}: log_history is not a list of rows")
    builder = CurveBuilder(path, "trainer_state.json")
    for row in history:
        step = number(row.get("step"))
        if step is None:
            raise RecordError(f"{path}: a row of log_history has no step")
        # The summary at the end repeats the last step with the mean over the whole training.
        if "train_runtime" not in row:
            builder.add(step, {key: value for key, value in row.items() if key not in ("step", "epoch")})
    every = state.get("logging_steps")
    if every and every != 1:
        builder.notes.append(f"its losses are means over {every} steps")
    return builder.build(loss)
