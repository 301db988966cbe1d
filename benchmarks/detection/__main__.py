"""The command: see the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.detection import tables
from benchmarks.detection.defects import DEFECTS
from benchmarks.detection.harmless import HARMLESS, TF32
from benchmarks.detection.judge import Judge
from benchmarks.detection.training import STEPS
from tests.pool import close_all


def main() -> None:
    """Run what is missing, judge everything, write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/detection"), help="of the runs")
    parser.add_argument("--document", type=Path, default=Path("docs/alignment.md"), help="gets the tables")
    args = parser.parse_args()
    judge = Judge(args.folder.resolve())

    try:
        defects, harmless = judge.verdicts(DEFECTS), judge.verdicts(HARMLESS)
        wide = [judge.verdict(case, TF32) for case in DEFECTS if case.reference == "fp32"]
    finally:
        close_all()
    by_title = {verdict.case.title: verdict for verdict in wide if not verdict.error}
    tables.update(
        args.document,
        tables.about("glm_tiny", STEPS),
        tables.defects(defects, by_title),
        tables.harmless(harmless),
    )


if __name__ == "__main__":
    main()
