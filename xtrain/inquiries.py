"""What a script asks its engine: settings, counters and rates, under DeepSpeedEngine's method names.

A mixin of XtrainEngine, kept apart so that engine.py shows the training step alone. Nothing here
changes the engine, except `set_train_batch_size`.
"""

from __future__ import annotations

import gc
from typing import Any

from xtrain.config import BatchSizes, XtrainConfig, solve_batch_sizes
from xtrain.errors import ConfigError
from xtrain.parallel import DataParallelGrid
from xtrain.zero.optimizer import ZeroOptimizer


class Inquiries:
    """Getters of XtrainEngine; the attributes below are the engine's."""

    xtrain_config: XtrainConfig
    batch_sizes: BatchSizes
    grid: DataParallelGrid
    optimizer: ZeroOptimizer | None
    micro_steps: int

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.batch_sizes.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward pass of one rank."""
        return self.batch_sizes.micro

    def gradient_accumulation_steps(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_sizes.accumulation

    def managed_gradient_accumulation(self) -> bool:
        """Whether updates happen after `gradient_accumulation_steps` micro-batches; else at every step()."""
        return self.xtrain_config.values.managed_gradient_accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train batch size, micro-batch size, accumulation steps)."""
        return self.batch_sizes.train, self.batch_sizes.micro, self.batch_sizes.accumulation

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the number of accumulation steps."""
        if self.micro_steps % self.batch_sizes.accumulation:
            raise ConfigError("set_train_batch_size() was called in the middle of an accumulation window")
        self.batch_sizes = solve_batch_sizes(train_batch_size, self.batch_sizes.micro, None, self.grid.size)
        self.micro_steps = 0

    def collect_python_gc(self) -> int:
        """Collect cyclic garbage now, which `disable_python_gc` leaves to the script; how many objects went."""
        return gc.collect()

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return [group["lr"] for group in self.optimizer.param_groups] if self.optimizer else []

    def get_global_grad_norm(self) -> float | None:
        """2-norm of the averaged gradients of the last update, before clipping; None before the first."""
        return self.optimizer.grad_norm if self.optimizer else None

    def gradient_clipping(self) -> float:
        """Largest gradient norm; 0 for none."""
        return self.xtrain_config.values.gradient_clipping

    def loss_scale(self) -> float:
        """Factor on the loss of the next backward; 1 for fp32 and bf16."""
        return self.optimizer.loss_scale if self.optimizer else 1.0

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts."""
        return self.optimizer is not None and self.optimizer.loss_scaler.dynamic

    def zero_optimization_stage(self) -> int:
        """ZeRO stage."""
        return self.xtrain_config.values.zero_optimization.stage

    def zero_optimization(self) -> bool:
        """Whether any state is partitioned."""
        return self.zero_optimization_stage() > 0

    def bfloat16_enabled(self) -> bool:
        """Whether parameters are bfloat16 with float32 masters."""
        return self.xtrain_config.values.bf16.enabled

    def fp16_enabled(self) -> bool:
        """Whether parameters are float16 with float32 masters."""
        return self.xtrain_config.values.fp16.enabled

    @property
    def dp_world_size(self) -> int:
        """Data-parallel ranks."""
        return self.grid.size

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as the user wrote it."""
        return self.xtrain_config.raw
