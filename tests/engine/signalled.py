"""A script that trains on, for test_leave_on_signal.py: python -m tests.engine.signalled FOLDER STEPS [WORDS]."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import xtrain
from tests import training
from xtrain import comm
from xtrain.engine import leave_on_signal


def main() -> None:
    """Train `STEPS` steps in all, from where FOLDER's checkpoint stands; say each step."""
    folder, steps, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    leave_on_signal._PATIENCE = 30.0 if "impatient" not in words else 2.0
    leave_on_signal._IDLE = 25.0 if "idle" not in words else 1.0
    torch.set_num_threads(1)
    engines = []
    for _ in range(2 if "two" in words else 1):
        model = training.build_model()
        config = training.config(stage=1, micro=4)
        engines.append(xtrain.initialize(model=model, config=config)[0])
    for engine in engines:
        if "unsaved" not in words:
            engine.load_checkpoint(folder)
    first = engines[0]
    while first.global_steps < steps:
        x, y = training.samples(first.global_steps)
        for engine in engines:
            mine = comm.get_rank() + comm.get_world_size() * torch.arange(
                training.GLOBAL_BATCH // comm.get_world_size()
            )
            for micro in mine.split(4):
                engine.backward(training.loss_of(engine, x[micro], y[micro]))
                engine.step()
        print(f"step {first.global_steps}", flush=True)
        time.sleep(0.02 if steps < 1000 else 0.1)
        if "idle" in words:
            with torch.no_grad():
                training.loss_of(first.eval(), x, y)
        if "sleepy" in words or "idle" in words:
            time.sleep(60)
    if comm.get_rank() == 0:
        weights = {name: value.tolist() for name, value in first.module.state_dict().items()}
        torch.save(weights, Path(folder) / "weights.pt")


if __name__ == "__main__":
    main()
