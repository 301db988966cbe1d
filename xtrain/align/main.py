"""`xtrain align REF CAND`: the verdict on two recorded runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtrain.align.compare import Policy, compare
from xtrain.align.plot import plot_curves
from xtrain.align.record import read_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `xtrain align`."""
    parser.add_argument("reference", help="run folder or metrics.jsonl")
    parser.add_argument("candidate", help="run folder or metrics.jsonl")
    parser.add_argument(
        "--policy", default="relative:0.02", help="exact, or relative:TOLERANCE on every step"
    )
    parser.add_argument("--plot", metavar="PNG", help="write a picture of both curves and their difference")


def run(args: argparse.Namespace) -> int:
    """Exit status 0: aligned, 1: not; errors (2) are raised."""
    policy = Policy.parse(args.policy)
    reference, candidate = read_record(args.reference), read_record(args.candidate)
    outcome = compare(reference, candidate, policy)
    print(outcome.sentence())
    if args.plot:
        names = [f"reference: {args.reference}", f"candidate: {args.candidate}"]
        curves = dict(zip(names, (reference.losses(), candidate.losses()), strict=True))
        plot_curves(curves, Path(args.plot), f"{outcome.steps} steps, policy {args.policy}")
        print(f"picture: {args.plot}")
    return 0 if outcome.aligned else 1
