"""All runs of the tables by title, and the training of one."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from benchmarks.detection.case import Case
from benchmarks.detection.defects import DEFECTS
from benchmarks.detection.harmless import HARMLESS, REFERENCES
from benchmarks.detection.held_out import (
    BELOW_THE_NOISE,
    HELD_OUT_DEFECTS,
    HELD_OUT_HARMLESS,
    HELD_OUT_REFERENCES,
)
from benchmarks.detection.tuned import TUNED_DEFECTS, TUNED_HARMLESS, TUNED_REFERENCES
from xtrain.base.run_folder import PERTURB_VARIABLE

WEAK = tuple(below.case for below in BELOW_THE_NOISE)
HELD_OUT = (*HELD_OUT_REFERENCES, *HELD_OUT_DEFECTS, *WEAK, *HELD_OUT_HARMLESS)
TUNED = (*TUNED_REFERENCES, *TUNED_DEFECTS, *TUNED_HARMLESS)
CASES = (*REFERENCES, *DEFECTS, *HARMLESS, *TUNED, *HELD_OUT)


def find(title: str) -> Case:
    """The case with this title."""
    return next(case for case in CASES if case.title == title)


def perform(
    title: str, folder: str, perturbation: str, steps: int | None = None, modules: bool = True
) -> None:
    """Train the case with this title on this rank.

    Args:
        folder: where the record goes.
        perturbation: value of XTRAIN_PERTURB; "": none.
        steps: of a shorter run, whose middle is its own; None: the case's.
        modules: whether they are recorded.
    """
    os.environ.pop(PERTURB_VARIABLE, None)
    if perturbation:
        os.environ[PERTURB_VARIABLE] = perturbation
    case = find(title)
    training = case.training(Path(folder), dist.get_world_size())
    if steps is not None:  # the schedule stays that of the whole run
        training.steps, training.middle = steps, steps // 2
    if not modules:
        del training.config["xtrain"]["record"]["modules_every"]
    case.change(training)
    training.run()
