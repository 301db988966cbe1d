"""All that training has made so far, and what it is made with: what checkpoints, hooks and getters work on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xtrain import comm
from xtrain.backends import Backend
from xtrain.config import BatchSizes, Config, XtrainConfig
from xtrain.parallel import DataParallelGrid
from xtrain.zero.optimizer import ZeroOptimizer
from xtrain.zero.partition import Partition


@dataclass
class Counters:
    """What has been counted since the start of training.

    Attributes:
        global_steps: optimizer steps, skipped ones included.
        micro_steps: micro-batches.
        global_samples: samples over all ranks.
        skipped_steps: steps whose gradients were not finite.
    """

    global_steps: int = 0
    micro_steps: int = 0
    global_samples: int = 0
    skipped_steps: int = 0


@dataclass(eq=False)
class TrainState:
    """The state of one engine on one rank.

    Attributes:
        module: the user's model; its parameters are views of flat buffers, or sharded.
        config: the checked configuration.
        backend: of the chip that it trains on.
        device: where the module is.
        grid: the ranks that share states, and those that hold other parts of the model.
        batch_sizes: micro-batch, accumulation steps, samples per step.
        partition: the flat buffers.
        optimizer: None when neither the config nor the script names one.
        lr_scheduler: stepped once per optimizer step that was not skipped.
        counters: steps and samples.
    """

    module: nn.Module
    config: XtrainConfig
    backend: Backend
    device: torch.device
    grid: DataParallelGrid
    batch_sizes: BatchSizes
    partition: Partition
    optimizer: ZeroOptimizer | None
    lr_scheduler: Any = None
    counters: Counters = field(default_factory=Counters)

    @property
    def values(self) -> Config:
        """The values of the configuration."""
        return self.config.values

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return self.config.values.zero_optimization.stage

    @property
    def global_rank(self) -> int:
        """Number of this process among all."""
        return comm.get_rank()

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return comm.get_world_size()

    @property
    def in_window(self) -> int:
        """Number of the running micro-batch in its accumulation window, from 0."""
        return self.counters.micro_steps % self.batch_sizes.accumulation

    def option(self, name: str, default: Any = 0.0) -> list[Any]:
        """An entry of each of the optimizer's parameter groups."""
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        return [group.get(name, default) for group in groups]

    def rates(self) -> list[float]:
        """Learning rate of each parameter group."""
        return self.option("lr")

    def place(self) -> tuple[int, int]:
        """(step, slot) of the running micro-batch; a slot is data-parallel rank x accumulation steps + index."""
        slot = self.grid.replica * self.batch_sizes.accumulation + self.in_window
        return self.counters.global_steps, slot
