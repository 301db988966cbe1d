"""Draws an elastic run beside an undisturbed one: `python benchmarks/elastic.py DISTURBED WHOLE OUT.png`.

Both are run folders of `xtrain launch` in aligned mode; how they were made stands in docs/measurements.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from xtrain.align.record import read_record

_RANKS = "#4477aa"


def starts(run: Path) -> list[tuple[int, int, int]]:
    """(first step, last step, ranks) of every start of a run, steps that were taken back included."""
    ranks = [entry["ranks"] for entry in _lines(run / "logs" / "attempts.jsonl") if "ended" in entry]
    spans: list[list[int]] = []
    for entry in _lines(run / "metrics.jsonl"):
        if entry["type"] == "header":
            spans.append([entry["from_step"] + 1, entry["from_step"]])
        elif entry["type"] == "step":
            spans[-1][1] = entry["step"]
    return [(first, last, count) for (first, last), count in zip(spans, ranks, strict=True)]


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("disturbed", type=Path)
    parser.add_argument("whole", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    disturbed, whole = read_record(args.disturbed).losses(), read_record(args.whole).losses()
    figure, (top, middle, bottom) = plt.subplots(
        3, 1, sharex=True, figsize=(9, 6), height_ratios=[4, 1, 1.2], layout="constrained"
    )
    top.plot(list(whole), list(whole.values()), color="#bbbbbb", linewidth=4, label="undisturbed")
    top.plot(
        list(disturbed), list(disturbed.values()), color="#cc3311", linewidth=1, label="a node lost and back"
    )
    top.set_ylabel("loss")
    top.legend(frameon=False)
    differences = [disturbed[step] - whole[step] for step in whole]
    middle.plot(list(whole), differences, color="#cc3311", linewidth=1)
    middle.set_ylabel("difference")
    for first, last, count in starts(args.disturbed):
        bottom.plot([first - 1, last], [count, count], color=_RANKS, linewidth=3, solid_capstyle="butt")
        bottom.annotate(
            f"{count} ranks", (first, count), xytext=(2, 4), textcoords="offset points", fontsize=8
        )
    bottom.set_ylim(0, max(count for _, _, count in starts(args.disturbed)) + 1.5)
    bottom.set_ylabel("ranks")
    bottom.set_xlabel("step")
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
