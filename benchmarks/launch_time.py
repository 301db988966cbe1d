"""From the command to the first step, on four hosts and on this machine with as many ranks, interleaved.

`python -m benchmarks.launch_time --rounds 5 --folder runs/launch_time`. Hosts are network namespaces with an sshd each
(tests/services/hosts.py). They share this machine's cores, so that imports which hosts of a cluster do side by side
wait for each other here: the processor time of an agent's imports is measured, too.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from tests.chaos.chaos import launch, on_hosts
from tests.parity.corpus import write_corpus
from tests.services.hosts import Hosts, missing

_STEP = '"type": "step"'


def first_step(run_dir: Path, corpus: Path, settings: list[str]) -> float:
    """Seconds until the first step is in the record."""
    began = time.monotonic()
    process = launch(run_dir, corpus, [*settings, "train.steps=2", "train.save_interval=0"])
    record, seconds = run_dir / "metrics.jsonl", 0.0
    while process.poll() is None:
        if not seconds and record.exists() and _STEP in record.read_text():
            seconds = time.monotonic() - began
        time.sleep(0.02)
    if process.returncode or not seconds:
        raise RuntimeError(run_dir.with_suffix(".log").read_text())
    return seconds


def import_time() -> float:
    """Processor seconds of what an agent imports."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import xtrain.launch.elastic_agent"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("runs/launch_time"))
    args = parser.parse_args()
    if (why := missing()) is not None:
        print(f"no hosts can be made here: {why}", file=sys.stderr)
        return 2
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    corpus = write_corpus(folder, 200)
    hosts = Hosts(folder / "hosts", [f"h{number}" for number in range(4)], net=11)
    hosts.start()
    here: list[float] = []
    there: list[float] = []
    try:
        for number in range(args.rounds):
            here.append(first_step(folder / f"here{number}", corpus, ["cluster.ranks_per_node=4"]))
            there.append(first_step(folder / f"there{number}", corpus, on_hosts(hosts)))
            print(f"local {here[-1]:.1f} s, four hosts {there[-1]:.1f} s", flush=True)
    finally:
        hosts.stop()
    imports = median(import_time() for _ in range(3))
    print(
        f"medians: local {median(here):.1f} s, four hosts {median(there):.1f} s, imports of an agent {imports:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
