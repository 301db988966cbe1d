"""Curves as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from xtrain.align.compare import Comparison
from xtrain.align.record import read_record
from xtrain.base.files import atomic_path

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


GREY = "#555555"


def name_of(outcome: Comparison) -> str:
    """What was compared, in words."""
    return outcome.column.replace("_", " ").replace("grad", "gradient")


def _figure(
    curves: Mapping[str, Mapping[int, float]], title: str, label: str, outcome: Comparison | None
) -> Any:
    """A figure of loss against step for each named curve.

    With the outcome of comparing the two curves also what is allowed, the ratio and the difference.
    matplotlib is imported here because it takes seconds that other commands need not spend.
    """
    from matplotlib.figure import Figure

    rows = 1 if outcome is None else 3
    figure = Figure(figsize=(8, 4.5 if outcome is None else 8), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=[3, 1, 1][:rows])[:, 0]
    for (name, curve), colour, style in zip(curves.items(), COLOURS, ("-", "--", "-.", ":"), strict=False):
        axes[0].plot(list(curve), list(curve.values()), style, label=name, color=colour, linewidth=1.4)
    axes[0].set_title(title)
    axes[0].set_ylabel(label)
    if outcome is not None:
        # Beyond the steps of an envelope everything is allowed: not drawn.
        limit = np.where(np.isfinite(outcome.limit), outcome.limit, np.nan)
        if outcome.policy.kind in ("relative", "envelope"):
            low, high = outcome.allowed()
            axes[0].fill_between(
                outcome.step, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="allowed"
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            axes[1].plot(outcome.step, outcome.candidate / outcome.reference, color=GREY, linewidth=1.0)
        axes[1].axhline(1.0, color=COLOURS[0], linewidth=0.8)
        axes[1].set_ylabel("ratio")
        axes[2].plot(outcome.step, outcome.difference, color=GREY, linewidth=1.0)
        axes[2].plot(outcome.step, limit, color=COLOURS[0], linewidth=0.8, label="allowed")
        if (outcome.difference > 0).any():
            axes[2].set_yscale("log")
        axes[2].set_ylabel("relative difference")
        if outcome.first_outside is not None:
            for axis in axes:
                axis.axvline(outcome.first_outside, color=COLOURS[1], linewidth=0.8, linestyle=":")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("step")
    return figure


def plot_curves(
    curves: Mapping[str, Mapping[int, float]], path: Path, title: str, outcome: Comparison | None = None
) -> None:
    """Draw losses into a PNG: each named curve, and what came of comparing the two."""
    figure = _figure(curves, title, "loss (nats per token)", outcome)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def draw_record(record: Path, path: Path, name: str, title: str) -> dict[int, float]:
    """Draw the loss curve of one record, if it has any step; its losses by step."""
    losses = read_record(record).losses()
    if losses:
        plot_curves({name: losses}, path, title)
    return losses


def curves_svg(outcome: Comparison) -> str:
    """The two curves and what came of comparing them, as an element of a web page that refers to nothing."""
    import matplotlib

    curves = {
        name: dict(zip(outcome.step.tolist(), values.tolist(), strict=True))
        for name, values in (("reference", outcome.reference), ("candidate", outcome.candidate))
    }
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "xtrain"}), StringIO() as file:
        _figure(curves, "", name_of(outcome), outcome).savefig(file, format="svg", metadata=nothing)
        text = file.getvalue()
    # Without the XML header, and without paths to clip by, which are references.
    return re.sub(r' clip-path="url[^"]*"', "", text[text.index("<svg") :])
