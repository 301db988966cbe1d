"""`xtrain align REF CAND`, and `xtrain align envelope`: the verdict on two runs, and the band it is judged by."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from xtrain.align import measure
from xtrain.align.alignment import POLICY, Alignment, align
from xtrain.align.plot import plot_curves
from xtrain.base.errors import RecordError
from xtrain.base.files import write_text

_USAGE = """
  xtrain align REF CAND [--policy POLICY] [--envelope FILE] [--html FILE] [--plot PNG] ...
  xtrain align envelope RUN RUN RUN ... -o FILE
  xtrain align envelope --runs K -o FILE -- COMMAND    ({run} in COMMAND is the run's folder)
  xtrain align --bisect GOOD BAD [--policy POLICY] [-o FOLDER]    (run folders of xtrain launch)
  xtrain align --bisect GOOD BAD [--policy POLICY] [-o FOLDER] -- COMMAND
      (DeepSpeed configs; in COMMAND, {config} is that of a trial and {run} its folder)"""
_ENVELOPE = "envelope"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xtrain align`."""
    parser.usage = _USAGE
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="reference and candidate: run folders, records, or files of other tools (docs/alignment.md); "
        "or the word envelope, and the runs to measure it from; or the two configurations of --bisect",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="with --bisect: run what the run folders say, although your launcher has not written them",
    )
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="find the settings that make BAD depart from GOOD, by running mixtures of the two",
    )
    parser.add_argument(
        "--policy",
        help="exact, envelope, relative:TOLERANCE on every step, or mean:TOLERANCE (default: relative:0.02)",
    )
    parser.add_argument(
        "--envelope",
        metavar="FILE",
        help="what --policy envelope judges by; default: envelope.npz beside REF",
    )
    parser.add_argument("--loss", metavar="NAME", help="the column that is the loss, in files of other tools")
    parser.add_argument(
        "--shift",
        type=int,
        metavar="N",
        help="add N to the step numbers of CAND: 1 for a run that counts from 0 beside one that counts from 1",
    )
    parser.add_argument(
        "--partial",
        action="store_true",
        help="runs of different length, with gaps, or of models that differ in part are aligned if what they have in "
        "common is; without it the exit status is 2",
    )
    parser.add_argument(
        "--plot", metavar="PNG", help="write a picture: curves, what is allowed, ratio, difference"
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the report as Markdown")
    parser.add_argument(
        "--html", metavar="FILE", help="write the report as one HTML file, with a map of the modules"
    )
    parser.add_argument("--junit", metavar="FILE", help="write the verdict as JUnit XML")
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="file that the envelope is written to; folder that the trials of --bisect are kept in, and those "
        "of an interrupted search found (default: a new one in runs)",
    )
    _add_measuring(parser)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    measuring = parser.add_argument_group("xtrain align envelope")
    measuring.add_argument(
        "--runs", type=int, metavar="K", help="run COMMAND so many times, each time perturbed"
    )
    measuring.add_argument(
        "--perturbation",
        type=float,
        metavar="SIZE",
        help="relative size of it; default: one ulp of each weight",
    )
    measuring.add_argument(
        "--false-alarms", type=float, metavar="RATE", help=f"default: {measure.FALSE_ALARMS:g}"
    )


def write_reports(alignment: Alignment, args: argparse.Namespace) -> list[str]:
    """Write what was asked for; returns a line for each file."""
    from xtrain.align.html import html
    from xtrain.align.text import junit, markdown

    written = []
    for kind, path, render in (
        ("report", args.markdown, markdown),
        ("report", args.html, html),
        ("JUnit XML", args.junit, junit),
    ):
        if path:
            try:
                write_text(Path(path), render(alignment))
            except OSError as error:
                raise RecordError(f"{path} cannot be written: {error.strerror}") from None
            written.append(f"{kind}: {path}")
    if args.plot:
        if alignment.curve is None:
            raise RecordError(
                "--plot needs losses, and these files have statistics of modules only: use --html"
            )
        names = [f"reference: {args.paths[0]}", f"candidate: {args.paths[1]}"]
        curves = (alignment.reference.losses(), alignment.candidate.losses())
        title = f"{alignment.curve.steps} steps, policy {alignment.policy}"
        try:
            plot_curves(dict(zip(names, curves, strict=True)), Path(args.plot), title, alignment.curve)
        except OSError as error:
            raise RecordError(f"{args.plot} cannot be written: {error.strerror}") from None
        written.append(f"picture: {args.plot}")
    return written


def run(args: argparse.Namespace, command: list[str] | None = None) -> int:
    """Exit status 0: aligned, 1: not (--bisect: and the settings were found); errors (2) are raised.

    Args:
        args: what was parsed.
        command: what stood after `--`; None: there was none.
    """
    if args.bisect:
        from xtrain.align import bisect  # Hydra, which comparing does without

        return bisect.run(args, command)
    if args.paths[0] == _ENVELOPE:
        for option in ("policy", "envelope", "plot", "markdown", "html", "junit", "partial", "shift"):
            if getattr(args, option) is not None and getattr(args, option) is not False:
                raise RecordError(f"--{option} has no meaning for `xtrain align envelope`, which measures")
        return measure.run(args, args.paths[1:], command)
    if command is not None:
        raise RecordError("`--` has a meaning for `xtrain align envelope` and --bisect only")
    if args.output is not None:
        raise RecordError("-o has a meaning for `xtrain align envelope` and --bisect only")
    for option in ("runs", "perturbation", "false_alarms"):
        if getattr(args, option) is not None:
            raise RecordError(f"--{option.replace('_', '-')} has a meaning for `xtrain align envelope` only")
    if len(args.paths) != 2:
        raise RecordError(f"xtrain align compares two runs, and was given {len(args.paths)}")
    from xtrain.align.text import print_report

    reference, candidate = args.paths
    policy = args.policy or POLICY
    alignment = align(reference, candidate, policy, args.envelope, args.loss, args.partial, args.shift or 0)
    print_report(alignment, Console(highlight=False))
    for line in write_reports(alignment, args):
        print(line)
    return alignment.exit_code
