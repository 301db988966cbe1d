"""The tables of docs/alignment.md."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch

from benchmarks.detection.judge import RUNS, Verdict
from benchmarks.detection.training import LENGTH, SAMPLES
from xtrain.align.environment import describe
from xtrain.align.text import markdown_table
from xtrain.base.files import write_text
from xtrain.version import __version__

BEGIN, END = "<!-- written by python -m benchmarks.detection -->", "<!-- end of what it writes -->"


def _step(step: int | None) -> str:
    return "-" if step is None else str(step)


def _module(verdict: Verdict) -> str:
    if not verdict.module:
        return "-"
    mark = "" if verdict.right_module else f" (not {verdict.case.module})"
    return f"{verdict.module}, {verdict.phase} of step {verdict.module_step}{mark}"


def defects(verdicts: list[Verdict], wide: dict[str, Verdict]) -> str:
    """Table and summary of injected defects; `wide`: verdicts by the TF32 band, by title."""
    ran = [v for v in verdicts if not v.error]
    flagged, right = sum(v.began is not None for v in ran), sum(v.right_step for v in ran)
    blamed = [v for v in ran if v.case.module]
    seen = [(v.acts, v.by_curves) for v in ran]
    near = sum(acts is not None and step is not None and abs(step - acts) <= 1 for acts, step in seen)
    rows = [
        [v.case.title, f"not run: {v.error}", *[""] * 6]
        if v.error
        else [
            v.case.title,
            _step(v.acts),
            _step(v.began) + ("" if v.right_step else " (!)"),
            _step(v.loss),
            _step(v.norm),
            _module(v),
            _step(wide[v.case.title].began) if v.case.title in wide else "",
            _step(v.common),
        ]
        for v in verdicts
    ]
    headings = (
        "defect", "acts from step", "report: departs from step", "loss outside", "norm outside", "module named",
        "by the TF32 band", "2 % mean error",
    )  # fmt: skip
    return (
        f"Of {len(ran)} defects the envelope flags {flagged}, {right} of them with the right step (±1), and names the "
        f"right module for {sum(v.right_module for v in blamed)} of the {len(blamed)} for which one is to blame.\n"
        "Losses and gradient norms alone, without statistics of modules, show "
        f"{sum(step is not None for _, step in seen)} of them, {near} with the right step.\n"
        f"By the TF32 band {sum(v.began is not None for v in wide.values())} of {len(wide)} are flagged, by a mean "
        f"relative error of 2 % {sum(v.common is not None for v in ran)} of {len(ran)}.\n\n"
        + markdown_table(headings, rows).rstrip()
    )


def harmless(verdicts: list[Verdict]) -> str:
    """Table and summary of harmless differences."""
    ran = [v for v in verdicts if not v.error]
    rows = [
        [v.case.title, f"not run: {v.error}", "", "", ""]
        if v.error
        else [
            v.case.title,
            v.case.band,
            "the same bits" if v.largest == 0 else f"{v.largest:.1e}",
            f"{v.times:.2f}",
            "aligned" if v.began is None else f"departs from step {v.began}",
        ]
        for v in verdicts
    ]
    headings = ("difference", "band", "largest difference of a loss", "of what is allowed", "verdict")
    return (
        f"Of {len(ran)} harmless differences the envelope flags {sum(v.began is not None for v in ran)} "
        f"(and a mean of 2 % {sum(v.common is not None for v in ran)}).\n\n"
        + markdown_table(headings, rows).rstrip()
    )


def about(model: str, steps: int) -> str:
    """What was trained, when and where."""
    processor = describe("cpu")["processor"]
    return (
        f"{model}, {steps} steps of {SAMPLES} samples of {LENGTH} tokens, envelopes of {RUNS} runs. Measured on "
        f"{datetime.date.today()} with xtrain {__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {processor}."
    )


def update(path: Path, *tables: str, begin: str = BEGIN) -> None:
    """Put the tables between two marks of a document, the first of which is `begin`."""
    text = path.read_text()
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} has no lines {begin} and {END}, between which the tables belong")
    write_text(path, before + "\n\n".join([begin, *tables]).rstrip("\n") + "\n\n" + END + after)
