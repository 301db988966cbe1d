"""Runs the cases, each once: records are kept and found again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

from benchmarks.detection.case import Case
from benchmarks.detection.cases import perform
from tests.pool import pool
from xtrain.align.record import Record, read_record
from xtrain.base.errors import RecordError

ERROR = "error.txt"


class NotRunError(Exception):
    """A case that could not be run here, or that ended with an error of its own."""


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _finished(folder: Path, steps: int) -> Record | None:
    try:
        record = read_record(folder)
    except RecordError:
        return None
    return record if len(record.step) == steps else None


def _train(case: Case, folder: Path, perturbation: str, steps: int | None, modules: bool) -> None:
    shorter = [] if steps is None else [str(steps)]
    if case.needs == "mpi4py":
        command = ["mpiexec", "-n", str(case.ranks), sys.executable, "-m", "benchmarks.detection.mpi"]
        subprocess.run([*command, case.title, str(folder), *shorter], check=True)
    elif case.environment:
        command = [sys.executable, "-m", "benchmarks.detection.alone", str(case.ranks)]
        own = {**os.environ, **dict(case.environment)}
        subprocess.run([*command, case.title, str(folder), perturbation, *shorter], check=True, env=own)
    else:
        pool(case.ranks).run(perform, case.title, str(folder), perturbation, steps, modules)


def record_of(
    root: Path, case: Case, perturbation: str = "", steps: int | None = None, modules: bool = True
) -> Record:
    """The record of a case, made now if there is none.

    Args:
        root: folder of all runs.
        perturbation: value of XTRAIN_PERTURB.
        steps: of a shorter run, which needs a root of its own; None: the case's.
        modules: whether they are recorded, which takes time; without them a root of their own is needed, too. Runs
            in processes of their own record them in any case.

    Raises:
        NotRunError: in one line, why there is no record.
    """
    folder = root / _slug(f"{case.title} {perturbation}")
    expected = case.training.steps if steps is None else steps
    if (found := _finished(folder, expected)) is not None:
        return found
    if (folder / ERROR).exists():
        raise NotRunError((folder / ERROR).read_text())
    if case.needs and importlib.util.find_spec(case.needs) is None:
        raise NotRunError(f"{case.needs} is not installed")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{case.title} {perturbation}".strip(), flush=True)
    try:
        _train(case, folder, perturbation, steps, modules)
    except Exception as error:  # what ends a run is an outcome, too
        traceback.print_exc()
        sentence = f"{type(error).__name__}: {error}".splitlines()[0]
        (folder / ERROR).write_text(sentence)
        raise NotRunError(sentence) from error
    found = _finished(folder, expected)
    if found is None:
        raise NotRunError(f"{folder} holds no record of {expected} steps")
    return found
