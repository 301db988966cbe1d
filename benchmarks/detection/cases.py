"""All runs of the tables by title, and the training of one."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from benchmarks.detection.case import Case
from benchmarks.detection.defects import DEFECTS
from benchmarks.detection.harmless import HARMLESS, REFERENCES
from benchmarks.detection.training import Training
from xtrain.base.run_folder import PERTURB_VARIABLE

CASES = (*REFERENCES, *DEFECTS, *HARMLESS)


def find(title: str) -> Case:
    """The case with this title."""
    return next(case for case in CASES if case.title == title)


def perform(title: str, folder: str, perturbation: str) -> None:
    """Train the case with this title on this rank.

    Args:
        folder: where the record goes.
        perturbation: value of XTRAIN_PERTURB; "": none.
    """
    os.environ.pop(PERTURB_VARIABLE, None)
    if perturbation:
        os.environ[PERTURB_VARIABLE] = perturbation
    training = Training(Path(folder), dist.get_world_size())
    find(title).change(training)
    training.run()
