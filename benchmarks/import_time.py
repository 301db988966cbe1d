"""What `import xtrain` and `xtrain.initialize` add to `import torch`, in fresh interpreters.

    python benchmarks/import_time.py [RUNS]

Prints medians in seconds. Runs alternate so that drift of a shared machine hits all alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time
start = time.perf_counter(); import torch; torch_seconds = time.perf_counter() - start
start = time.perf_counter(); import {name}; {touch}; print(torch_seconds, time.perf_counter() - start)
"""
CASES = {"xtrain": "xtrain.initialize", "deepspeed": "deepspeed.initialize"}


def measure(name: str) -> tuple[float, float] | None:
    """(seconds of import torch, seconds of the package on top), or None when it is not installed."""
    code = CODE.format(name=name, touch=CASES[name])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        return None
    first, second = done.stdout.split()[-2:]
    return float(first), float(second)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for _ in range(runs):
        for name, seen in results.items():
            if (result := measure(name)) is not None:
                seen.append(result)
    print(f"{'package':<12}{'runs':>6}{'import torch':>14}{'package on top':>16}{'spread':>16}")
    for name, seen in results.items():
        if not seen:
            print(f"{name:<12}  not installed")
            continue
        top = [second for _, second in seen]
        print(
            f"{name:<12}{len(seen):>6}{statistics.median(first for first, _ in seen):>14.2f}"
            f"{statistics.median(top):>16.3f}{min(top):>9.3f} …{max(top):.3f}"
        )


if __name__ == "__main__":
    main()
