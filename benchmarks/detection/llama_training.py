"""The Llama of the held-out cases in training, in bf16 and in fp16 with a dynamic loss scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.detection.llama import Llama, LlamaConfig
from benchmarks.detection.rows import Rows
from benchmarks.detection.training import SAMPLES, SEED, Training
from xtrain.data.corpus import find_files
from xtrain.data.tokens import prepare

LENGTH, VOCABULARY = 64, 512


class LlamaTraining(Training):
    """One run of it; see `Training`. Dropout is on, with the masks of aligned mode.

    The loss is a mean over the labelled tokens of the whole global batch, so that it does not depend on the split.
    """

    steps, warmup, middle = 100, 10, 50
    precision: dict[str, Any] = {}

    def __init__(self, folder: Path, ranks: int) -> None:
        super().__init__(folder, ranks)
        self.config.update(self.precision)
        self.section(aligned=True)

    def make_sampler(self) -> Any:
        """Packed rows."""
        return Rows(prepare(find_files(None), VOCABULARY), LENGTH, SEED, SAMPLES)

    @property
    def divisor(self) -> int:
        """What the engine divides losses by: accumulation steps, and ranks."""
        return self.accumulation * self.ranks

    def read(self, step: int, slot: int) -> dict[str, Any]:
        """The micro-batch of a slot of a step (from 1), and what its loss is divided by."""
        found = self._sampler.batch(step, slot, self.micro)
        return {**found, "tokens": self._sampler.labelled(step) / self.divisor}

    def build_model(self) -> nn.Module:
        """The Llama."""
        torch.manual_seed(SEED)
        model = Llama(LlamaConfig(**{"vocab_size": VOCABULARY, **self.architecture}))
        for change in self.model_made:
            change(model)
        return model


class Bf16(LlamaTraining):
    """In bf16."""

    precision = {"bf16": {"enabled": True}}


class Fp16(LlamaTraining):
    """In fp16 with a dynamic loss scale, which falls at the first steps and once more later, and grows between.

    Whether real gradients overflow depends on the last bit when they are near the limit, in correct runs, too. So the
    steps that overflow are said here: their gradients, not their loss, are far too large. All others stay below a
    quarter of the limit. What a restart that forgets the scale begins with is beyond it.
    """

    overflows = (1, 2, 3, 4, 5, 6, 60)
    precision = {
        "fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 30, "hysteresis": 1}
    }

    def __init__(self, folder: Path, ranks: int) -> None:
        super().__init__(folder, ranks)
        self.loss = self.overflowing

    def overflowing(self, **batch: Any) -> torch.Tensor:
        """The loss, whose gradient is too large at the steps of `overflows`."""
        found: torch.Tensor = self.engine(**batch)
        excess = 2.0**20 if self.step in self.overflows else 0.0
        return found + (found - found.detach()) * excess if excess else found
