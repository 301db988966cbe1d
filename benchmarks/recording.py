"""What recording costs: step times of a GLM without a record, with one, and with module statistics every 10 steps.

    python benchmarks/recording.py [--rounds 40] [--every 10]

One rank, one thread. The variants take turns, block by block, so that a busy machine slows all of them alike;
the figure is the ratio of the blocks' medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import xtrain
from xtrain.models.glm import GLM, GLMConfig

VARIANTS = ("no record", "record", "record with modules")


def make_engine(record: dict[str, Any] | None) -> Any:
    """The engine of one variant; the same weights in all."""
    torch.manual_seed(0)
    config = GLMConfig(vocab_size=2048, num_layers=4, hidden_size=128, num_heads=4, ffn_size=352)
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "xtrain": {} if record is None else {"record": record},
    }
    engine, *_ = xtrain.initialize(model=GLM(config), config=settings)
    engine.train()
    return engine


def step(engine: Any, batch: dict[str, torch.Tensor]) -> float:
    """One optimizer step; seconds of processor time, which other programs don't disturb as much."""
    start = time.process_time()
    engine.backward(engine(**batch))
    engine.step()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="blocks of `every` steps of each variant")
    parser.add_argument("--every", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokens = torch.randint(0, 2048, (8, 128), generator=torch.Generator().manual_seed(0))
    places = torch.stack([torch.arange(128), torch.zeros(128, dtype=torch.long)]).expand(8, 2, 128)
    batch = {
        "input_ids": tokens, "position_ids": places, "context_lengths": torch.full((8,), 64), "labels": tokens,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        records: list[dict[str, Any] | None] = [
            None,
            {"path": str(Path(folder) / "plain.jsonl")},
            {"path": str(Path(folder) / "modules.jsonl"), "modules_every": args.every},
        ]
        engines = [make_engine(record) for record in records]
        blocks: list[list[float]] = [[] for _ in engines]
        for block in range(args.rounds + 1):
            for turn in range(len(engines)):
                index = (block + turn) % len(engines)
                spent = sum(step(engines[index], batch) for _ in range(args.every))
                if block:  # the first one warms up
                    blocks[index].append(spent)
        seconds = [statistics.median(spent) for spent in blocks]
        sizes = [Path(record["path"]).stat().st_size if record else 0 for record in records]
    steps = (args.rounds + 1) * args.every
    for name, spent, size in zip(VARIANTS, seconds, sizes, strict=True):
        cost, written = f"{spent / seconds[0] - 1:+.2%}", size / steps
        print(f"{name}: {1000 * spent / args.every:.1f} ms a step ({cost}), {written:.0f} bytes a step")


if __name__ == "__main__":
    main()
