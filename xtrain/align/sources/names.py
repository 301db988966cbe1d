"""Which of a file's columns is the loss, and which are the gradient norm, learning rate, loss scale and step."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from xtrain.base.errors import RecordError, nearest

STEP = ("step", "global_step", "trainer/global_step", "_step", "iteration", "iter", "train/global_step")
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


def find_step(names: Iterable[str]) -> str | None:
    """The column of step numbers."""
    given = list(names)
    lowered = {name.strip().lower(): name for name in reversed(given)}
    return next((lowered[wanted] for wanted in STEP if wanted in lowered), None)


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


def find_others(names: Collection[str]) -> dict[str, str]:
    """Column of the file by xtrain's name, for what is recognised beyond the loss."""
    found = {}
    for ours, theirs in OTHERS.items():
        fitting = [name for name in names if _plain(name) in theirs and not _NOT_TRAINING.search(name)]
        if len(fitting) == 1:
            found[ours] = fitting[0]
    return found
