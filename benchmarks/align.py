"""How long `xtrain align` takes and how much memory it needs for two records of 100,000 steps with 100 modules.

    python benchmarks/align.py [--steps 100000] [--modules 100] [--every 10] [--folder DIR]

Writes the records first (not measured), then starts the command and reads its peak memory from the kernel.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PHASES = ("forward", "backward", "gradient", "optimizer")
STATISTICS = ("mean", "abs_mean", "rms", "max_abs")


def write_record(path: Path, steps: int, modules: int, every: int, seed: int) -> None:
    """A record as the Recorder writes it, of random numbers."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"type": "header", "version": 2, "world_size": 1, "from_step": 0}) + "\n")
        names = [f"layers.{index}" for index in range(modules)]
        file.write(json.dumps({"type": "names", "modules": names}) + "\n")
        for step in range(1, steps + 1):
            loss = 2 + draw.gauss(0, 1e-4)
            line = {
                "type": "step", "step": step, "loss": loss, "loss_hex": loss.hex(), "grad_norm": draw.gauss(1, 1e-3),
                "lr": [1e-3], "loss_scale": 1.0, "applied": True, "tokens": 4096, "seconds": 0.1234567,
                "elapsed": 0.1 * step, "loss_by_rank": [loss, loss],
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            if (step - 1) % every == 0:
                for phase in PHASES:
                    # Nine digits, as measured numbers have.
                    values = [float(f"{1 + draw.random() * 1e-3:.9g}") for _ in range(modules)]
                    filled = dict.fromkeys(STATISTICS, values)
                    entry = {
                        "type": "modules",
                        "step": step,
                        "phase": phase,
                        **filled,
                        "nonfinite": [0.0] * modules,
                    }
                    file.write(json.dumps(entry) + "\n")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--modules", type=int, default=100)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("options", nargs="*", help="after --: options of xtrain align")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        paths = [Path(name) / f"{side}.jsonl" for side in ("reference", "candidate")]
        for seed, path in enumerate(paths):
            write_record(path, args.steps, args.modules, args.every, seed)
        size = sum(path.stat().st_size for path in paths) / 1e6
        command = [sys.executable, "-m", "xtrain.cli", "align", *map(str, paths), *args.options]
        start = time.perf_counter()
        status = subprocess.run(command).returncode
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{args.steps} steps, {args.modules} modules every {args.every} steps, {size:.0f} MB of records: "
            f"{seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of processor time), "
            f"{used.ru_maxrss / 1024:.0f} MiB, exit status {status}"
        )


if __name__ == "__main__":
    main()
