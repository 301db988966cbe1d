"""Which sort of file a path means, by what is in it, not by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xtrain.align.record import Record, read_record
from xtrain.align.sources import hugging_face, megatron, msprobe, tables, tensorboard
from xtrain.align.sources.names import find_step
from xtrain.base.errors import RecordError
from xtrain.base.run_folder import METRICS

_START = 1 << 16
_KNOWN = (
    "a run record of xtrain, TensorBoard events, a CSV or JSON Lines export, trainer_state.json, a Megatron log or "
    "an msProbe dump"
)


def read_curve(path: str | Path, loss: str | None = None) -> Record:
    """Read any file or folder that holds a curve.

    Args:
        path: a file, or a folder: a run folder, one with event files, a Hugging Face output folder or checkpoint,
            or an msProbe dump.
        loss: the column that is the loss, for files with names of their own.

    Raises:
        RecordError: it is missing, or nothing that is known, or damaged.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, loss)
    try:
        with path.open("rb") as file:
            start = file.read(_START)
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist: pass a run folder or a file with a curve") from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    if start.startswith(b'{"type": "header"') or _is_header(start):
        return read_record(path)
    if tensorboard.is_event_file(start):
        return tensorboard.read_events(path, loss)
    return _read_text(path, loss)


def _is_header(start: bytes) -> bool:
    try:
        entry = json.loads(start.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and entry.get("type") == "header"


def _read_folder(folder: Path, loss: str | None) -> Record:
    if (folder / METRICS).exists():
        return read_record(folder / METRICS)
    if next(folder.glob(tensorboard.EVENT_FILES), None) is not None:
        return tensorboard.read_events(folder, loss)
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    states = [state for state in states if state.exists()]
    if states:
        if not (folder / "trainer_state.json").exists():
            states.sort(key=lambda state: int("".join(filter(str.isdigit, state.parent.name)) or 0))
            return read_curve(states[-1], loss)
        return read_curve(states[0], loss)
    if msprobe.step_folders(folder):
        return msprobe.read_dump(folder)
    raise RecordError(f"{folder} holds no {METRICS}, event files, trainer_state.json or msProbe dump")


def _read_text(path: Path, loss: str | None) -> Record:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecordError(f"{path} is neither text nor TensorBoard events: it has to be {_KNOWN}") from None
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error}") from None
    if not text.strip():
        raise RecordError(f"{path} is empty: it has to be {_KNOWN}")
    first = text.lstrip().partition("\n")[0]
    whole = _json(text)
    if isinstance(whole, dict):
        if "log_history" in whole:
            return hugging_face.read_trainer_state(path, whole, loss)
        if msprobe.is_dump(whole):
            return msprobe.read_dump(path)
    row = _json(first)
    if isinstance(row, dict):
        if row.get("type") in ("step", "modules", "names"):
            return read_record(path)  # it says what is missing
        if find_step(row) is not None:
            return tables.read_json_lines(path, text, loss)
    if tables.delimiter_of(first) is not None:
        return tables.read_csv(path, text.lstrip(), loss)
    if megatron.LINE.search(text):
        return megatron.read_log(path, text, loss)
    raise RecordError(f"{path} holds no curve that is known: it has to be {_KNOWN}")


def _json(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return None
    try:
        return json.loads(text, parse_float=_Decimal)
    except (ValueError, RecursionError):
        return None


class _Decimal(float):
    """A number that remembers how it was written: its digits say how it was rounded."""

    def __new__(cls, text: str) -> _Decimal:
        made = super().__new__(cls, text)
        made.text = text
        return made

    text: str

    def __repr__(self) -> str:
        return self.text
