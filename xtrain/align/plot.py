"""Loss curves as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xtrain.files import atomic_path

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def plot_curves(curves: Mapping[str, Mapping[int, float]], path: Path, title: str) -> None:
    """Draw loss against step for each named curve into a PNG; two curves also get their difference.

    matplotlib is imported here because it takes seconds that other commands need not spend.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pair = len(curves) == 2
    figure = Figure(figsize=(8, 6 if pair else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2 if pair else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1] if pair else [1]
    )[:, 0]
    for (name, curve), colour, style in zip(curves.items(), _COLOURS, ("-", "--", "-.", ":"), strict=False):
        axes[0].plot(list(curve), list(curve.values()), style, label=name, color=colour, linewidth=1.4)
    axes[0].set_title(title)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    if pair:
        reference, candidate = curves.values()
        common = [step for step in reference if step in candidate]
        difference = [
            abs(candidate[step] - reference[step]) / max(abs(reference[step]), 1e-12) for step in common
        ]
        axes[1].plot(common, difference, color="#555555", linewidth=1.0)
        axes[1].set_ylabel("relative difference")
        axes[1].grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
