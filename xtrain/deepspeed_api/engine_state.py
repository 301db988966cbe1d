"""What a script asks its engine about its state: counters, rates, norms, ranks, under DeepSpeedEngine's names.

Configuration keys are in engine_settings.py.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from xtrain import comm
from xtrain.base.log import log_dist
from xtrain.config import BatchSizes
from xtrain.engine.engine import Engine
from xtrain.metrics.flops_profiler.profiler import FlopsProfiler
from xtrain.metrics.metrics import Metrics
from xtrain.metrics.monitor.monitor import MonitorMaster
from xtrain.metrics.timer import SynchronizedWallClockTimer, ThroughputTimer
from xtrain.zero import names
from xtrain.zero.partition import Partition
from xtrain.zero.train_state import TrainState


def _counter(name: str) -> Any:
    """A counter of the engine, which a script may set."""

    def get(self: EngineState) -> int:
        count: int = getattr(self.train_state.counters, name)
        return count

    def put(self: EngineState, value: int) -> None:
        setattr(self.train_state.counters, name, value)
        self._tell_boundary()

    return property(get, put)


class EngineState(Engine):
    """Getters for what training has made."""

    train_metrics: Metrics

    global_steps = _counter("global_steps")
    micro_steps = _counter("micro_steps")
    global_samples = _counter("global_samples")
    skipped_steps = _counter("skipped_steps")

    @property
    def _is_gradient_accumulation_boundary(self) -> bool | None:
        """What `set_gradient_accumulation_boundary` was told last; DeepSpeed's private name."""
        return self._boundary_override

    @property
    def partition(self) -> Partition:
        """The flat buffers."""
        return self.train_state.partition

    @property
    def batch_sizes(self) -> BatchSizes:
        """Micro-batch, accumulation steps, samples per step."""
        return self.train_state.batch_sizes

    @property
    def basic_optimizer(self) -> Any:
        """The optimizer that works on this rank's slices, as torch knows it."""
        optimizer = self.train_state.optimizer
        return optimizer.optimizer if optimizer else None

    # Batches

    def train_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.batch_sizes.train

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per forward pass of one rank."""
        return self.batch_sizes.micro

    def gradient_accumulation_steps(self) -> int:
        """Forward passes per optimizer step."""
        return self.batch_sizes.accumulation

    def get_batch_info(self) -> tuple[int, int, int]:
        """(train batch size, micro-batch size, accumulation steps)."""
        return self.batch_sizes.train, self.batch_sizes.micro, self.batch_sizes.accumulation

    # Optimizer

    def get_lr(self) -> list[float]:
        """Learning rate of each parameter group."""
        return self.train_state.rates()

    def get_mom(self) -> list[Any]:
        """Momentum of each parameter group: a number for SGD and RMSprop, else the betas."""
        return self.train_state.option("momentum" if self.optimizer_name() in ("SGD", "RMSprop") else "betas")

    def _print_step(self, state: TrainState, boundary: bool) -> None:
        """The line of `steps_per_print`."""
        every, counters = state.values.steps_per_print, state.counters
        if boundary and every and counters.global_steps % every == 0:
            rates = f"lr={self.get_lr()}, mom={self.get_mom()}"
            log_dist(f"step={counters.global_steps}, skipped={counters.skipped_steps}, {rates}", ranks=[0])

    def get_type(self) -> list[Any]:
        """The entry `type` of each parameter group; 0.0 where there is none, as in DeepSpeed."""
        return self.train_state.option("type")

    def optimizer_name(self) -> str | None:
        """Type of the optimizer: the config's name for it, or the class of the script's own."""
        section = self.xtrain_config.values.optimizer
        if self.client_optimizer is None:
            return None if section is None else section.reported_type
        return type(self.basic_optimizer).__name__

    def get_global_grad_norm(self) -> float | None:
        """2-norm of the averaged gradients of the last update, before clipping; None before the first, and
        when `zero_optimization.compute_grad_norm` is false."""
        optimizer = self.train_state.optimizer
        return optimizer.grad_norm if optimizer else None

    def loss_scale(self) -> float:
        """Factor on the loss of the next backward; 1 for fp32 and bf16."""
        optimizer = self.train_state.optimizer
        return optimizer.loss_scale if optimizer else 1.0

    def dynamic_loss_scale(self) -> bool:
        """Whether the loss scale adapts."""
        optimizer = self.train_state.optimizer
        return optimizer is not None and optimizer.loss_scaler.dynamic

    # Ranks

    @property
    def dp_world_size(self) -> int:
        """Data-parallel ranks."""
        return self.grid.replicas

    @property
    def mp_world_size(self) -> int:
        """Model-parallel ranks: tensor x pipeline."""
        return self.grid.model.size

    @property
    def data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that see different samples; None where sequences are divided and the mpu has no such group."""
        return self.grid.data_group if self.grid.sequence > 1 else self.grid.group or comm.get_world_group()

    @property
    def seq_data_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same parameters: data- and sequence-parallel ones together."""
        return self.grid.group or comm.get_world_group()

    @property
    def seq_dp_world_size(self) -> int:
        """How many they are."""
        return self.grid.size

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share one sample."""
        return self.grid.sequence

    def get_data_parallel_rank(self) -> int:
        """Number of this process among the data-parallel ranks."""
        return self.grid.replica

    def get_model_parallel_rank(self) -> int:
        """Number of this process among the model-parallel ranks."""
        return self.grid.model.rank

    def get_tensor_parallel_rank(self) -> int:
        """Number of this process among the ranks that a layer is divided over."""
        return self.grid.model.tensor_rank

    def get_sequence_parallel_group(self) -> dist.ProcessGroup | None:
        """The ranks that share one sample; None when each has samples of its own."""
        return self.grid.sequence_group

    seq_parallel_group = property(get_sequence_parallel_group)

    # Metrics

    @property
    def monitor(self) -> MonitorMaster:
        """Where scalars go; a script may write its own with `engine.monitor.write_events`."""
        return self.train_metrics.monitor

    @property
    def timers(self) -> SynchronizedWallClockTimer:
        """Timers by name; those of `wall_clock_breakdown`, and the script's own."""
        return self.train_metrics.timers

    @property
    def tput_timer(self) -> ThroughputTimer:
        """Samples per second."""
        return self.train_metrics.tput_timer

    @property
    def flops_profiler(self) -> FlopsProfiler:
        """The profiler of the section `flops_profiler`.

        Raises:
            AttributeError: the section is not enabled.
        """
        if self.train_metrics.flops_profiler is None:
            raise AttributeError("the engine has no flops_profiler: set flops_profiler.enabled in the config")
        return self.train_metrics.flops_profiler

    def get_wall_clock_timers(self) -> dict[str, float]:
        """Milliseconds of each timer of `wall_clock_breakdown` at the end of the last `step()`; else nothing.

        Those ending in `_microstep` are of the last micro-batch, the others of the window that it ended or is in.
        """
        return dict(self.train_metrics.last_times)

    # The rest

    @property
    def param_names(self) -> dict[nn.Parameter, str]:
        """Name of each of the module's parameters."""
        return {param: name for name, param in names.parameters(self.module)}

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as the user wrote it."""
        return self.xtrain_config.raw

    @property
    def sparse_tensor_module_names(self) -> set[str]:
        """Modules whose gradients travel as sparse tensors: none do."""
        return set()

    @property
    def has_moe_layers(self) -> bool:
        """Always False: expert parallelism is not there yet."""
        return False

    pipeline_parallelism = False
    """Whether the model is a pipeline: never, pipelines are not there yet. A subclass with one of its own sets it."""

    def random_ltd_enabled(self) -> bool:
        """Always False: random layer-token dropping is not there yet."""
        return False
