"""What `xtrain run` and the device shim cost: Python's start, and a training step of a script that says CUDA.

`python -m benchmarks.device_shim --rounds 20`. Steps with and without the shim alternate in one process, on the same
model; starts alternate, too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpt import GPT
from xtrain.shims import process


def start_times(rounds: int) -> tuple[float, float]:
    """Median seconds of `python script` and of `xtrain run script`, for an empty script."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text("")
        plain, shimmed = (
            [sys.executable, str(script)],
            [sys.executable, "-m", "xtrain.cli", "run", str(script)],
        )
        found: dict[str, list[float]] = {"plain": [], "shimmed": []}
        for _ in range(rounds):
            for name, command in (("plain", plain), ("shimmed", shimmed)):
                began = time.perf_counter()
                subprocess.run(command, check=True)
                found[name].append(time.perf_counter() - began)
    return median(found["plain"]), median(found["shimmed"])


def _step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, device: str) -> float:
    """Seconds of a step, with a batch that is made and moved as scripts do."""
    began = time.perf_counter()
    loss = model(torch.randint(0, 2048, (4, 64)).to(device))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()
    return time.perf_counter() - began


def step_times(rounds: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step without and with the shim."""
    torch.manual_seed(0)
    model = GPT("1m", 64)
    optimizer = torch.optim.AdamW(model.parameters())
    found: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for number in range(rounds + 1):
        for device in ("cpu", "cuda"):
            if device == "cuda":
                process.install("on")
            times = [_step(model, optimizer, device) for _ in range(steps)]
            process.uninstall()
            if number:  # the first round warms up
                found[device] += times
    return median(found["cpu"]), median(found["cuda"])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plain, shimmed = start_times(args.rounds)
    print(f"start: python {plain:.3f} s, xtrain run {shimmed:.3f} s, {shimmed - plain:+.3f} s")
    without, with_shim = step_times(args.rounds, 10)
    print(
        f"step: {without * 1e3:.2f} ms, with the shim {with_shim * 1e3:.2f} ms, ratio {with_shim / without:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
