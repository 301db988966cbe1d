"""A small GLM on data that is the same on every machine, and the stored curves of it in references/.

`python -m tests.align.small_glm` (`make align-reference`) records them anew: once as the reference, and RUNS times
from weights perturbed by one ulp, from which the envelope is measured. What they are for: test_curves.py.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import xtrain
from tests.pool import close_all, pool
from xtrain.align.alignment import align
from xtrain.align.envelope import measure_records
from xtrain.align.sources import read_curve
from xtrain.base.run_folder import METRICS, PERTURB_VARIABLE
from xtrain.models.glm import GLM, IGNORE_INDEX, GLMConfig

REFERENCE = Path("references/small_glm.jsonl")
ENVELOPE = Path("references/small_glm.npz")
"""Both beside this file, as the fixture `xtrain_align` counts."""
STEPS, GLOBAL_BATCH, MODULES_EVERY = 50, 8, 10
RUNS = 8
SIZES = GLMConfig(vocab_size=64, num_layers=2, hidden_size=64, num_heads=4, ffn_size=96)
CONTEXT, BLANK = 8, 24
"""Tokens of a sample that are given, and that are predicted."""


def tokens(sample: int) -> npt.NDArray[np.int64]:
    """CONTEXT + BLANK + 1 tokens of a noisy chain: a function of the number of the sample, in integers alone.

    Raw words of Philox are the same in every version of NumPy, which the draws made of them need not be.
    """
    length = CONTEXT + BLANK + 1
    draws = np.random.Philox(key=sample).random_raw(length) >> np.uint64(32)
    chain = np.empty(length, np.int64)
    chain[0] = int(draws[0]) % SIZES.vocab_size
    for place in range(1, length):
        noise = int(draws[place]) % 4
        chain[place] = (5 * chain[place - 1] + 3 + noise) % SIZES.vocab_size
    return chain


def batch(step: int, first: int, size: int) -> dict[str, torch.Tensor]:
    """Samples `first` to `first + size - 1` of the global batch of a step, as the model takes them."""
    chains = np.stack([tokens(step * GLOBAL_BATCH + first + index) for index in range(size)])
    length = CONTEXT + BLANK
    place = np.arange(length)
    labels = chains[:, 1:].copy()
    labels[:, :CONTEXT] = IGNORE_INDEX
    positions = np.stack([np.minimum(place, CONTEXT), np.maximum(place - CONTEXT + 1, 0)])
    return {
        "input_ids": torch.from_numpy(chains[:, :length].copy()),
        "position_ids": torch.from_numpy(np.tile(positions, (size, 1, 1))),
        "context_lengths": torch.full((size,), CONTEXT),
        "labels": torch.from_numpy(labels),
    }


def config(stage: int = 1, micro: int = 4, bf16: bool = False, **section: Any) -> dict[str, Any]:
    """The DeepSpeed config; `section` is its "xtrain"."""
    small = {"stage3_param_persistence_threshold": 100} if stage == 3 else {}
    return {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20_000, **small},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.035, "betas": [0.9, 0.95], "eps": 1e-8}},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {"warmup_max_lr": 0.035, "warmup_num_steps": 5, "total_num_steps": STEPS},
        },
        "xtrain": {"backend": "cpu", **section},
    }


def train(folder: str, settings: dict[str, Any], perturbation: str = "") -> None:
    """Train on this rank, and record to `metrics.jsonl` in a folder.

    Args:
        settings: arguments of `config`.
        perturbation: what XTRAIN_PERTURB is set to.
    """
    given = config(**settings)
    # Not the folder's name: a record that is stored tells nothing of the machine's folders.
    given["xtrain"]["record"] = {"path": METRICS, "modules_every": MODULES_EVERY}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv(PERTURB_VARIABLE, perturbation)
        with xtrain.aligned_init(1):
            model = GLM(SIZES)
        engine = xtrain.initialize(model=model, model_parameters=list(model.parameters()), config=given)[0]
        try:
            _steps(engine)
        finally:
            engine.destroy()


def _steps(engine: Any) -> None:
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    for step in range(STEPS):
        for index in range(accumulation):
            first = (engine.global_rank * accumulation + index) * micro
            engine.backward(engine(**batch(step, first, micro)))
            engine.step()


def main() -> int:
    """Record reference and envelope anew; returns the verdict of the one by the other."""
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for seed in range(RUNS + 1):
            Path(str(seed)).mkdir()
            pool(2).run(train, str(Path(folder, str(seed))), {}, str(seed) if seed else "")
        close_all()
        envelope = measure_records([read_curve(str(seed + 1)) for seed in range(RUNS)], size=0.0)
        envelope.save(here / ENVELOPE)
        print(envelope.sentence())
        print(f"outside the others' envelope: {envelope.leave_one_out()} of {RUNS}")
        shutil.copyfile(Path("0", METRICS), here / REFERENCE)
        found = align(here / REFERENCE, "0", "envelope", here / ENVELOPE)
        print(found.sentence())
    return found.exit_code


if __name__ == "__main__":
    # Ranks import `train` by the module's name, which is not __main__'s.
    from tests.align import small_glm

    sys.exit(small_glm.main())
