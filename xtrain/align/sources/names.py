"""Which of a file's columns is the loss, and which are the gradient norm, learning rate, loss scale and step."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from xtrain.base.errors import RecordError, nearest

STEPS, SAMPLES, TOKENS = "steps", "samples", "tokens"
"""What a file may count in the place of steps."""
STEP = ("step", "global_step", "trainer/global_step", "_step", "iteration", "iter", "train/global_step")
_AXES = {
    SAMPLES: ("consumed_samples", "consumed samples", "samples", "global_samples"),
    TOKENS: ("consumed_tokens", "consumed tokens", "tokens", "num_tokens"),
}
"""Columns that count something else, for files without steps."""
_IN_NAMES = {
    SAMPLES: re.compile(r"(^|/)samples/| (vs|over) samples$", re.IGNORECASE),
    TOKENS: re.compile(r"(^|/)tokens/| (vs|over) tokens$", re.IGNORECASE),
}
"""Names of curves that say what their axis counts: `Train/Samples/train_loss` of DeepSpeed's monitors, `lm loss vs
samples` of Megatron."""
_IN_FILES = {
    SAMPLES: re.compile(r"(^|-)Train_Samples_|[ _]vs[ _]samples$"),
    TOKENS: re.compile(r"(^|-)Train_Tokens_|[ _]vs[ _]tokens$"),
}
"""And names of files: `Train_Samples_train_loss.csv` of DeepSpeed's monitors, TensorBoard's downloads."""
_LOSS = ("loss", "train_loss", "training_loss", "lm_loss", "lm_loss_training", "total_loss")
_NOT_TRAINING = re.compile(r"(^|[/_ .-])(eval|val|valid|validation|test)([/_ .-]|$)", re.IGNORECASE)
OTHERS = {
    "grad_norm": ("grad_norm", "gradient_norm", "global_grad_norm", "total_norm", "grad_norm_total"),
    "lr": ("lr", "learning_rate", "learningrate"),
    "loss_scale": ("loss_scale",),
    "tokens": ("tokens", "num_tokens"),
}


def _plain(name: str) -> str:
    """ "Train/Samples/train_loss" and "lm loss" as "train_loss" and "lm_loss"."""
    last = re.split(r"/| - ", name.strip())[-1]
    return re.sub(r"[\s.-]+", "_", last.strip().lower())


def _without_axis(name: str) -> str:
    return re.sub(r" (vs|over) (samples|tokens)$", "", name.strip(), flags=re.IGNORECASE)


def find_step(names: Iterable[str]) -> str | None:
    """The column of step numbers; without one, that of samples or tokens."""
    given = list(names)
    lowered = {name.strip().lower(): name for name in reversed(given)}
    known = (*STEP, *_AXES[SAMPLES], *_AXES[TOKENS])
    return next((lowered[wanted] for wanted in known if wanted in lowered), None)


def unit_of(curve: str, axis: str | None = None, file: str = "") -> str:
    """What the axis of a curve counts: "steps", "samples" or "tokens".

    Args:
        curve: name of its column.
        axis: name of the column of its steps; None: it has none (events).
        file: name of the file, without folder and ending.
    """
    for unit, pattern in _IN_NAMES.items():
        if axis is not None and axis.strip().lower() in _AXES[unit]:
            return unit
        if pattern.search(curve.strip()) or _IN_FILES[unit].search(file):
            return unit
    return STEPS


def find_loss(names: Collection[str], wanted: str | None, path: Path) -> str:
    """The column that holds the training loss.

    Args:
        names: of the columns with numbers.
        wanted: the name that the user gave, if any.
        path: for messages.

    Raises:
        RecordError: there is none, or more than one, or not the wanted one.
    """
    shown = ", ".join(sorted(names)[:20]) or "none"
    if wanted is not None:
        if wanted in names:
            return wanted
        close = nearest(wanted, names)
        hint = f"did you mean {close!r}? " if close else ""
        raise RecordError(f"{path} has no column {wanted!r}: {hint}it has {shown}")
    for candidates in (
        [name for name in names if name.strip().lower() in _LOSS],
        [name for name in names if _plain(name) in _LOSS and not _NOT_TRAINING.search(name)],
    ):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise RecordError(
                f"{path} has several curves that may be the loss: choose one of {', '.join(sorted(candidates))} with "
                "--loss NAME"
            )
    raise RecordError(
        f"{path} has no column that looks like a training loss: choose one of {shown} with --loss NAME"
    )


def find_others(names: Collection[str], unit: str = STEPS, shared: bool = True) -> dict[str, str]:
    """Column of the file by xtrain's name, for what is recognised beyond the loss.

    Args:
        unit: what the axis of the loss counts.
        shared: whether all columns have one axis; else only curves over the same unit are taken.
    """
    found = {}
    for ours, theirs in OTHERS.items():
        fitting = [
            name
            for name in names
            if _plain(_without_axis(name)) in theirs
            and not _NOT_TRAINING.search(name)
            and (shared or unit_of(name) == unit)
        ]
        if len(fitting) == 1:
            found[ours] = fitting[0]
    return found
