"""`xtrain align envelope`: from recorded runs, or by running a command K times with perturbed weights."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from xtrain.align.command import RUN, last_lines, run_command
from xtrain.align.envelope import WIDE, Envelope, measure_records
from xtrain.align.record import Record
from xtrain.align.sources import read_curve
from xtrain.base.errors import RecordError
from xtrain.base.run_folder import METRICS, PERTURB_VARIABLE, RUN_DIR_VARIABLE

FALSE_ALARMS = 0.01
_PERTURB = "xtrain.reproducible.perturbation.perturb_if_asked(model)"


def _run_once(command: list[str], folder: Path, seed: int, size: float | None) -> Record:
    """One perturbed run of the command; its record.

    Raises:
        RecordError: it failed, or wrote no record.
    """
    perturbation = str(seed) if size is None else f"{seed}:{size!r}"
    log = folder.with_suffix(".log")
    status = run_command(command, folder, log, {}, {PERTURB_VARIABLE: perturbation})
    if status != 0:
        raise RecordError(
            f"run {seed} of the reference ended with status {status} ({log}): {last_lines(log)}"
        )
    if not (folder / METRICS).exists():
        raise RecordError(
            f"run {seed} wrote no record to {folder / METRICS}: pass {RUN} as its run folder "
            f"(xtrain launch run_dir={RUN}), or record to the folder in {RUN_DIR_VARIABLE}"
        )
    return read_curve(folder)


def _same(one: Record, other: Record) -> bool:
    """Whether two runs have the same losses to the last bit, at all steps that both have."""
    step, mine, its = np.intersect1d(one.step, other.step, assume_unique=True, return_indices=True)
    return len(step) > 0 and np.array_equal(one.loss[mine], other.loss[its], equal_nan=True)


def _not_perturbed(one: Record, other: Record) -> RecordError:
    """The command was run twice, and nothing differs."""
    return RecordError(
        f"run 1 and run 2 have the same losses to the last bit ({one.path} and {other.path}): the script does not obey "
        f"{PERTURB_VARIABLE}, which says how to perturb the initial weights; xtrain's engine does, and a loop of its "
        f"own calls {_PERTURB} after it has made its model"
    )


def _all_different(records: list[Record]) -> None:
    """Refuse recorded runs of which two are the same: their spread says nothing.

    Raises:
        RecordError: two are.
    """
    for place, record in enumerate(records):
        for other in records[:place]:
            if _same(other, record):
                raise RecordError(
                    f"{other.path} and {record.path} have the same losses to the last bit, so their spread says "
                    f"nothing: leave one out, or record it anew from perturbed weights ({PERTURB_VARIABLE}=SEED, "
                    f"another seed for each run, for xtrain's engine or a loop that calls {_PERTURB})"
                )


def _rerun(command: list[str], runs: int, output: Path, size: float | None, say: bool = True) -> list[Record]:
    output.parent.mkdir(parents=True, exist_ok=True)
    # Kept: they can be looked at, and measured again with another false-alarm rate.
    work = Path(tempfile.mkdtemp(dir=output.parent, prefix=f"{output.stem}-runs-")).resolve()
    records = []
    for seed in range(1, runs + 1):
        folder = work / str(seed)
        folder.mkdir()
        records.append(_run_once(command, folder, seed, size))
        if seed == 2 and _same(*records):
            raise _not_perturbed(*records)
        if say:
            print(f"run {seed} of {runs}: {len(records[-1].step)} steps, {records[-1].path}", flush=True)
    return records


def run(args: argparse.Namespace, paths: list[str], command: list[str] | None) -> int:
    """Carry out the command; returns the exit status."""
    if args.output is None:
        raise RecordError("xtrain align envelope needs -o FILE: where the envelope is written")
    rate = FALSE_ALARMS if args.false_alarms is None else args.false_alarms
    if not 0 < rate <= 0.5:
        raise RecordError(f"--false-alarms is a rate above 0 and up to 0.5, not {rate:g}")
    output = Path(args.output)
    if output.suffix != ".npz":
        raise RecordError(f"-o {args.output}: an envelope is a .npz file")
    size = None
    if command is not None or args.runs is not None:
        if not command or args.runs is None or paths:
            raise RecordError(
                "give recorded runs (xtrain align envelope RUN RUN RUN -o FILE) or --runs K -o FILE -- COMMAND"
            )
        if args.runs < 2:
            raise RecordError(f"--runs {args.runs}: an envelope needs 2 runs at least, and 5 are better")
        if args.perturbation is not None and not 0 < args.perturbation < 1:
            raise RecordError(f"--perturbation is a relative size between 0 and 1, not {args.perturbation:g}")
        size = 0.0 if args.perturbation is None else args.perturbation
        records = _rerun(command, args.runs, output, args.perturbation)
    else:
        if args.perturbation is not None:
            raise RecordError("--perturbation needs --runs K -- COMMAND: recorded runs have made theirs")
        records = [read_curve(path, args.loss) for path in paths]
    _all_different(records)
    envelope = measure_records(records, rate, size)
    try:
        envelope.save(output)
    except OSError as error:
        raise RecordError(f"{output} cannot be written: {error.strerror}") from None
    _report(envelope, output)
    return 0


def _report(envelope: Envelope, output: Path) -> None:
    print(envelope.sentence())
    outside = envelope.leave_one_out()
    if outside is not None:
        print(
            f"checked by leaving each run out: {outside} of {len(envelope.curves)} are outside the others' envelope"
        )
    elif len(envelope.curves) == 3 and envelope.factors.lasting <= WIDE:
        print("three runs are too few to check it by leaving one out: record one or two more")
    for what, factors in envelope.wide():
        print(
            f"so few runs, straying so differently in {what}, say little: {factors.lasting:.0f} times their spread is "
            "allowed; record more of them"
        )
    print(f"envelope: {output}")
