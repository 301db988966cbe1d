"""`python -m tests.chaos --runs 30 --folder runs/chaos`: disturbed runs one after another, and a table of them."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

from tests.chaos.chaos import KINDS, STEPS, Curve, Verdict, disturbed, launch
from tests.parity.corpus import write_corpus
from tests.services.hosts import Hosts, missing
from xtrain.align.record import read_record


def reference(folder: Path, corpus: Path, ranks: int) -> Curve:
    """Losses of the run that nothing was done to, on this machine."""
    run_dir = folder / "whole"
    if (
        not (run_dir / "metrics.jsonl").exists()
        and launch(run_dir, corpus, [f"cluster.ranks_per_node={ranks}"]).wait()
    ):
        raise RuntimeError(f"the undisturbed run has failed: {run_dir.with_suffix('.log').read_text()}")
    losses = read_record(run_dir).losses()
    if len(losses) != STEPS:
        raise RuntimeError(f"the undisturbed run has {len(losses)} steps")
    return losses


def main() -> int:
    """Run, print, and 1 if any run was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if (why := missing()) is not None:
        print(f"no hosts can be made here: {why}", file=sys.stderr)
        return 2
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(folder, 200)
    whole = reference(folder, corpus, args.hosts)
    hosts = Hosts(folder / "hosts", [f"h{number}" for number in range(args.hosts)], net=9)
    hosts.start()
    verdicts = []
    try:
        for number in range(args.runs):
            kind = KINDS[number % len(KINDS)]
            verdict = disturbed(kind, hosts, folder / f"run{number}", corpus, whole, args.seed + number)
            verdicts.append(verdict)
            told = "; ".join(verdict.wrong) or "well"
            cost = f"{verdict.lost} steps lost, {verdict.seconds:.0f} s"
            what = " | ".join(verdict.incidents)
            print(f"{number:3} {kind:9} at step {verdict.at_step:3}: {told}; {cost}; {what}", flush=True)
    finally:
        hosts.stop()
    _table(verdicts)
    return int(any(verdict.wrong for verdict in verdicts))


def _table(verdicts: list[Verdict]) -> None:
    by_kind = defaultdict(list)
    for verdict in verdicts:
        by_kind[verdict.kind].append(verdict)
    print("\n| what | runs | well | most steps lost | seconds, median |\n| --- | --- | --- | --- | --- |")
    for kind, of_kind in by_kind.items():
        well = sum(not verdict.wrong for verdict in of_kind)
        lost, seconds = max(v.lost for v in of_kind), median(v.seconds for v in of_kind)
        print(f"| {kind} | {len(of_kind)} | {well} | {lost} | {seconds:.0f} |")


if __name__ == "__main__":
    sys.exit(main())
