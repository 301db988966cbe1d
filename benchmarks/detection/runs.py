"""Runs the cases, each once: records are kept and found again."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

from benchmarks.detection.case import Case
from benchmarks.detection.cases import perform
from benchmarks.detection.training import STEPS
from tests.pool import pool
from xtrain.align.record import Record, read_record
from xtrain.base.errors import RecordError

ERROR = "error.txt"


class NotRunError(Exception):
    """A case that could not be run here, or that ended with an error of its own."""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _finished(folder: Path) -> Record | None:
    try:
        record = read_record(folder)
    except RecordError:
        return None
    return record if len(record.step) == STEPS else None


def _train(case: Case, folder: Path, perturbation: str) -> None:
    if case.needs == "mpi4py":
        command = ["mpiexec", "-n", str(case.ranks), sys.executable, "-m", "benchmarks.detection.mpi"]
        subprocess.run([*command, case.title, str(folder)], check=True)
    else:
        pool(case.ranks).run(perform, case.title, str(folder), perturbation)


def record_of(root: Path, case: Case, perturbation: str = "") -> Record:
    """The record of a case, made now if there is none.

    Args:
        root: folder of all runs.
        perturbation: value of XTRAIN_PERTURB.

    Raises:
        NotRunError: in one line, why there is no record.
    """
    folder = root / _slug(f"{case.title} {perturbation}")
    if (found := _finished(folder)) is not None:
        return found
    if (folder / ERROR).exists():
        raise NotRunError((folder / ERROR).read_text())
    if case.needs and importlib.util.find_spec(case.needs) is None:
        raise NotRunError(f"{case.needs} is not installed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{case.title} {perturbation}".strip(), flush=True)
    try:
        _train(case, folder, perturbation)
    except Exception as error:  # what ends a run is an outcome, too
        traceback.print_exc()
        sentence = f"{type(error).__name__}: {error}".splitlines()[0]
        (folder / ERROR).write_text(sentence)
        raise NotRunError(sentence) from error
    found = _finished(folder)
    if found is None:
        raise NotRunError(f"{folder} holds no record of {STEPS} steps")
    return found
