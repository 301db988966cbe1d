"""The tables of 16-bit runs in docs/alignment.md: cases that the detector was tuned by, and cases held out from it.

python -m benchmarks.detection.sixteen_bits            # what it was tuned by: GLM
python -m benchmarks.detection.sixteen_bits --held-out # what it was never tuned by: a Llama
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.detection import tables
from benchmarks.detection.cases import find
from benchmarks.detection.held_out import BELOW_THE_NOISE, HELD_OUT_DEFECTS, HELD_OUT_HARMLESS
from benchmarks.detection.judge import Judge, Verdict
from benchmarks.detection.runs import NotRunError, record_of
from benchmarks.detection.tuned import TUNED_DEFECTS, TUNED_HARMLESS
from tests.pool import close_all
from xtrain.align.alignment import align_records
from xtrain.align.compare import Policy
from xtrain.align.text import markdown_table

NEAR = 2
"""Steps by which the step in a report may be off."""
RERUNS, FIRST_SEED, RERUN_STEPS = 50, 101, 40
"""Correct runs that no envelope has seen, of each precision, and how long they are."""


def _defects(verdicts: list[Verdict]) -> str:
    ran = [verdict for verdict in verdicts if not verdict.error]
    blamed = [verdict for verdict in ran if verdict.case.module]
    rows = [
        [
            verdict.case.title,
            verdict.case.report or "-",
            "-" if verdict.acts is None else str(verdict.acts),
            _began(verdict),
            "-" if verdict.by_curves is None else str(verdict.by_curves),
            _module(verdict),
            f"{verdict.early:.1e}, {verdict.largest:.1e}",
        ]
        for verdict in ran
    ]
    headings = (
        "defect", "public report", "acts from step", "report: departs from step", "loss or norm outside",
        "module named", "largest difference of a loss: in 10 steps, ever",
    )  # fmt: skip
    return (
        f"Of {len(ran)} defects the envelope flags {sum(v.began is not None for v in ran)}, "
        f"{sum(v.near(NEAR) for v in ran)} of them with the right step (±{NEAR}), and names the right module for "
        f"{sum(v.right_module for v in blamed)} of the {len(blamed)} for which one is to blame.\n\n"
        + markdown_table(headings, rows).rstrip()
        + _not_run(verdicts)
    )


def _began(verdict: Verdict) -> str:
    if verdict.began is None:
        return "-"
    return str(verdict.began) + ("" if verdict.near(NEAR) else " (!)")


def _module(verdict: Verdict) -> str:
    if not verdict.module:
        return "-"
    wrong = "" if verdict.right_module else f" (not {verdict.case.module})"
    return f"{verdict.module}, {verdict.phase} of step {verdict.module_step}{wrong}"


def _not_run(verdicts: list[Verdict]) -> str:
    told = [f"- {verdict.case.title}: {verdict.error}" for verdict in verdicts if verdict.error]
    return "\n\nNot run here:\n\n" + "\n".join(told) if told else ""


def _harmless(verdicts: list[Verdict]) -> str:
    ran = [verdict for verdict in verdicts if not verdict.error]
    rows = [
        [
            verdict.case.title,
            "the same bits" if verdict.largest == 0 else f"{verdict.largest:.1e}",
            f"{verdict.times:.2f}",
            "aligned" if verdict.began is None else f"departs from step {verdict.began}",
        ]
        for verdict in ran
    ]
    headings = ("difference", "largest difference of a loss", "of what is allowed to last", "verdict")
    return (
        f"Of {len(ran)} harmless differences the envelope flags {sum(v.began is not None for v in ran)}.\n\n"
        + markdown_table(headings, rows).rstrip()
        + _not_run(verdicts)
    )


def _reruns(judge: Judge, references: tuple[str, ...]) -> str:
    """How many correct runs that the envelope has not seen it calls departed."""
    told = []
    for title in references:
        alone = replace(find(title), ranks=1)  # so that two of them can run at a time
        reference, envelope = record_of(judge.root, find(title)), judge.envelope(title, "one ulp")
        departed = 0
        for seed in range(FIRST_SEED, FIRST_SEED + RERUNS):
            candidate = record_of(judge.root / "reruns", alone, str(seed), steps=RERUN_STEPS)
            found = align_records(reference, candidate, Policy("envelope"), envelope)
            departed += not found.aligned
            print(f"  {title}, seed {seed}: {found.sentence()}", flush=True)
        told.append(f"{departed} of {RERUNS} in {title}")
    return (
        f"Of correct runs of {RERUN_STEPS} steps on one rank, with other seeds of the perturbation, which no envelope "
        f"was measured from, it calls departed: {', '.join(told)}. The rate that it states is 1 %."
    )


def _below() -> str:
    if not BELOW_THE_NOISE:
        return ""
    rows = [
        [
            below.case.title,
            below.case.report,
            f"{below.largest:.1e}, {below.mean:.1e}",
            f"{below.noise_largest:.1e}, {below.noise_mean:.1e}",
        ]
        for below in BELOW_THE_NOISE
    ]
    headings = (
        "defect", "public report", "it moves a loss by: at most, in the mean", "correct variants do by",
    )  # fmt: skip
    return (
        "Defects that move the loss less than correct variants do, and were not judged:\n\n"
        + markdown_table(headings, rows).rstrip()
    )


def main() -> None:
    """Run what is missing, judge everything, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--held-out", action="store_true", help="the cases that nothing was tuned by")
    parser.add_argument("--folder", type=Path, default=Path("runs/sixteen-bits"), help="of the runs")
    parser.add_argument("--document", type=Path, default=Path("docs/alignment.md"), help="gets the tables")
    args = parser.parse_args()
    judge = Judge(args.folder.resolve())

    held_out = args.held_out
    try:
        defects = judge.verdicts(HELD_OUT_DEFECTS if held_out else TUNED_DEFECTS)
        harmless = judge.verdicts(HELD_OUT_HARMLESS if held_out else TUNED_HARMLESS)
        rest = [_reruns(judge, ("bf16", "fp16")), _below()] if held_out else []
    except NotRunError as error:
        raise SystemExit(f"a reference could not be trained: {error}") from error
    finally:
        close_all()
    kind = "held out" if held_out else "tuned"
    model = "A Llama with packed rows" if held_out else "A GLM of two layers"
    tables.update(
        args.document,
        tables.about(model, defects[0].case.training.steps),
        _defects(defects),
        _harmless(harmless),
        *[text for text in rest if text],
        begin=f"<!-- written by python -m benchmarks.detection.sixteen_bits: {kind} -->",
    )


if __name__ == "__main__":
    main()
