"""DeepSpeed's learning-rate schedules, with their exact step numbering.

Source: https://www.deepspeed.ai/docs/schedulers-api/ and the behaviour of deepspeed 0.19.8. A schedule
sets its starting rate when it is built (iteration -1), and the n-th `step()` sets the rate of iteration
n - 1; so the second optimizer step uses the schedule's value at 0.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xtrain.base.errors import ConfigError, unknown_name
from xtrain.base.log import log_dist
from xtrain.config.arguments import check_value, construct
from xtrain.config.schema import SchedulerConfig

Rate = float | Sequence[float]
"""One value, or one for each parameter group."""


class Schedule(ABC):
    """What all schedules share: an iteration counter and the rates of the optimizer's groups.

    Args:
        optimizer: anything with `param_groups`.
        last_batch_iteration: iteration to continue from; -1 starts.
    """

    def __init__(self, optimizer: Any, last_batch_iteration: int) -> None:
        self.optimizer = optimizer
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] = []
        self._apply()

    @abstractmethod
    def get_lr(self) -> list[float]:
        """The rate of each group at `last_batch_iteration`."""

    def get_last_lr(self) -> list[float]:
        """The rate of each group as last set."""
        return self._last_lr

    def _apply(self) -> None:
        self._last_lr = list(self.get_lr())
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(lr)  # a script, or a captured graph, holds this tensor
            else:
                group["lr"] = lr

    def step(self, last_batch_iteration: int | None = None) -> None:
        """Advance by one iteration, or go to the given one."""
        self.last_batch_iteration = (
            self.last_batch_iteration + 1 if last_batch_iteration is None else last_batch_iteration
        )
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """The iteration."""
        return {"last_batch_iteration": self.last_batch_iteration}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a saved iteration; the groups' rates are set to match it."""
        self.last_batch_iteration = state_dict["last_batch_iteration"]
        self._apply()


def _per_group(optimizer: Any, name: str, value: Rate) -> list[float]:
    count = len(optimizer.param_groups)
    if not torch.is_tensor(value):
        check_value(value, Rate, name)
    if isinstance(value, Sequence):
        if len(value) != count:
            raise ConfigError(f"{name} has {len(value)} values for {count} parameter groups")
        return list(value)
    return [value] * count


def _positive_integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}")
    return value


def _positive(name: str, value: Any) -> float:
    check_value(value, float, name)
    if value <= 0:
        raise ConfigError(f"{name} must be positive, got {value!r}")
    return float(value)


def _check_length(warmup: float, total: float) -> None:
    """Say so when the run ends before the warm-up does."""
    if total < warmup:
        log_dist(
            f"the learning rate warms up over {warmup:g} steps (warmup_num_steps), but the run has {total:g} "
            "(total_num_steps): it ends before the highest rate is reached",
            ranks=[0],
            level=logging.WARNING,
        )


def _warmup_curve(kind: str, steps: int) -> Callable[[int], float]:
    """Share of the way from the lowest to the highest rate at an iteration below `steps`."""
    if kind == "linear":
        return lambda iteration: iteration / steps
    if kind == "log":
        return lambda iteration: math.log(iteration + 1) / math.log(steps)
    raise ConfigError(f"warmup_type: {unknown_name('schedule', str(kind), ('log', 'linear'))}")


class WarmupLR(Schedule):
    """Raise the rate from `warmup_min_lr` to `warmup_max_lr` over `warmup_num_steps` steps, then keep it.

    Args:
        warmup_max_lr: None takes the groups' own rates.
        warmup_num_steps: at least 2 steps are used.
        warmup_type: "log" or "linear".
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: Rate = 0.0,
        warmup_max_lr: Rate | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        if warmup_max_lr is None:
            warmup_max_lr = [float(group["lr"]) for group in optimizer.param_groups]
        self.min_lrs = _per_group(optimizer, "warmup_min_lr", warmup_min_lr)
        self.max_lrs = _per_group(optimizer, "warmup_max_lr", warmup_max_lr)
        self.warmup_num_steps = max(2, _positive_integer("warmup_num_steps", warmup_num_steps))
        self.warmup_type = warmup_type
        self._warmup = _warmup_curve(warmup_type, self.warmup_num_steps)
        super().__init__(optimizer, last_batch_iteration)

    def _after_warmup(self) -> float:
        return 1.0

    def get_lr(self) -> list[float]:
        """The rate of each group at `last_batch_iteration`."""
        if self.last_batch_iteration < 0:
            return self.min_lrs
        warming = self.last_batch_iteration < self.warmup_num_steps
        gamma = self._warmup(self.last_batch_iteration) if warming else self._after_warmup()
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then decay linearly to zero at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: float,
        warmup_min_lr: Rate = 0.0,
        warmup_max_lr: Rate | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _positive("total_num_steps", total_num_steps)
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )
        _check_length(self.warmup_num_steps, self.total_num_steps)

    def _after_warmup(self) -> float:
        left = self.total_num_steps - self.last_batch_iteration
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


class WarmupCosineLR(Schedule):
    """Warm up to the groups' own rates, then follow half a cosine down to `cos_min_ratio` of them.

    Args:
        total_num_steps: iteration at which the lowest rate is reached and kept.
        warmup_min_ratio: share of the rate at iteration 0 (iteration -1 has rate 0).
    """

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: float,
        warmup_min_ratio: float = 0.0,
        warmup_num_steps: int = 1000,
        cos_min_ratio: float = 0.0001,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        self.total_num_steps = _positive("total_num_steps", total_num_steps)
        self.warmup_num_steps = max(2, _positive_integer("warmup_num_steps", warmup_num_steps))
        _check_length(self.warmup_num_steps, self.total_num_steps)
        self.warmup_min_ratio = warmup_min_ratio
        self.cos_min_ratio = cos_min_ratio
        self.warmup_type = warmup_type
        self._warmup = _warmup_curve(warmup_type, self.warmup_num_steps)
        self.org_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        super().__init__(optimizer, last_batch_iteration)

    def get_lr_ratio(self) -> float:
        """Share of the groups' own rates at `last_batch_iteration`."""
        iteration = self.last_batch_iteration
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_num_steps:
            return self.warmup_min_ratio + (1.0 - self.warmup_min_ratio) * self._warmup(iteration)
        decaying = max(1, self.total_num_steps - self.warmup_num_steps)
        progress = min(1.0, (iteration - self.warmup_num_steps + 1) / decaying)
        cosine = (1.0 + math.cos(math.pi * progress)) / 2.0
        return max(0.0, self.cos_min_ratio + (1.0 - self.cos_min_ratio) * cosine)

    def get_lr(self) -> list[float]:
        """The rate of each group at `last_batch_iteration`."""
        ratio = self.get_lr_ratio()
        return [lr * ratio for lr in self.org_lrs]


class LRRangeTest(Schedule):
    """Raise the rate without end, to find where training breaks (Smith, 2018).

    Args:
        lr_range_test_min_lr: rate to start from.
        lr_range_test_step_size: iterations of one interval.
        lr_range_test_step_rate: how many times the lowest rate is added in an interval.
        lr_range_test_staircase: in jumps at the ends of intervals, instead of evenly.
    """

    def __init__(
        self,
        optimizer: Any,
        lr_range_test_min_lr: Rate = 1e-3,
        lr_range_test_step_size: int = 2000,
        lr_range_test_step_rate: float = 1.0,
        lr_range_test_staircase: bool = False,
        last_batch_iteration: int = -1,
    ) -> None:
        self.min_lrs = _per_group(optimizer, "lr_range_test_min_lr", lr_range_test_min_lr)
        self.step_size = _positive_integer("lr_range_test_step_size", lr_range_test_step_size)
        self.step_rate = lr_range_test_step_rate
        self.staircase = lr_range_test_staircase
        super().__init__(optimizer, last_batch_iteration)

    def get_lr(self) -> list[float]:
        """The rate of each group at `last_batch_iteration`."""
        intervals = (self.last_batch_iteration + 1) / self.step_size
        if self.staircase:
            intervals = math.floor(intervals)
        return [lr * (1 + self.step_rate * intervals) for lr in self.min_lrs]


class OneCycle(Schedule):
    """One triangle of the rate up and down, with the first beta mirrored, then decay (Smith, 2018).

    Args:
        cycle_min_lr, cycle_max_lr: ends of the triangle.
        cycle_first_step_size, cycle_second_step_size: iterations up and down (None: as many as up).
        cycle_first_stair_count, cycle_second_stair_count: steps of a staircase; 0 is a straight line.
        decay_step_size: iterations of one decay interval after the cycle; 0 keeps the lowest rate.
        decay_lr_rate, decay_mom_rate: strength of the decay in one interval.
        cycle_momentum: also move the first beta from `cycle_max_mom` to `cycle_min_mom` and back; the
            second beta becomes 0.99, as in DeepSpeed. Ignored for optimizers without betas.
    """

    def __init__(
        self,
        optimizer: Any,
        cycle_min_lr: Rate,
        cycle_max_lr: Rate,
        decay_lr_rate: float = 0.0,
        cycle_first_step_size: float = 2000,
        cycle_second_step_size: float | None = None,
        cycle_first_stair_count: int = 0,
        cycle_second_stair_count: int | None = None,
        decay_step_size: int = 0,
        cycle_momentum: bool = True,
        cycle_min_mom: Rate = 0.8,
        cycle_max_mom: Rate = 0.9,
        decay_mom_rate: float = 0.0,
        last_batch_iteration: int = -1,
    ) -> None:
        self.first = _positive("cycle_first_step_size", cycle_first_step_size)
        self.second = self.first if cycle_second_step_size is None else cycle_second_step_size
        if self.second < 0:
            raise ConfigError(f"cycle_second_step_size must not be negative, got {self.second}")
        self.first_stairs = cycle_first_stair_count
        self.second_stairs = (
            self.first_stairs if cycle_second_stair_count is None else cycle_second_stair_count
        )
        self.decay_step_size = decay_step_size
        self.decay_lr_rate = decay_lr_rate
        self.decay_mom_rate = decay_mom_rate
        self.min_lrs = _per_group(optimizer, "cycle_min_lr", cycle_min_lr)
        self.max_lrs = _per_group(optimizer, "cycle_max_lr", cycle_max_lr)
        self.cycle_momentum = cycle_momentum and "betas" in optimizer.param_groups[0]
        self.min_moms = _per_group(optimizer, "cycle_min_mom", cycle_min_mom)
        self.max_moms = _per_group(optimizer, "cycle_max_mom", cycle_max_mom)
        super().__init__(optimizer, last_batch_iteration)

    @property
    def total_size(self) -> float:
        """Iterations of the cycle."""
        return self.first + self.second

    @property
    def step_ratio(self) -> float:
        """The share of them in which the rate rises."""
        return self.first / self.total_size

    def _height(self) -> float:
        """Place on the triangle, 0 at its feet and 1 at its top."""
        position = (self.last_batch_iteration + 1) % (self.first + self.second)
        rising = position <= self.first
        done, length = (
            (position, self.first) if rising else (self.first + self.second - position, self.second)
        )
        stairs = self.first_stairs if rising else self.second_stairs
        return math.floor(done * stairs / length) / stairs if stairs > 0 else done / length

    def _decay_intervals(self) -> float | None:
        """Decay intervals since the cycle ended; None during the cycle."""
        since = self.last_batch_iteration - (self.first + self.second)
        if since < 0:
            return None
        return (since + 1) / self.decay_step_size if self.decay_step_size > 0 else 0.0

    def get_lr(self) -> list[float]:
        """The rate of each group at `last_batch_iteration`."""
        if self.last_batch_iteration < 0:
            return self.min_lrs
        intervals = self._decay_intervals()
        if intervals is not None:
            return [lr / (1 + self.decay_lr_rate * intervals) for lr in self.min_lrs]
        height = self._height()
        return [low + (high - low) * height for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def get_mom(self) -> list[tuple[float, float]] | None:
        """The betas of each group, the first of which is cycled; None when momentum is left alone."""
        return [(momentum, 0.99) for momentum in self._momenta()] if self.cycle_momentum else None

    def _momenta(self) -> list[float]:
        intervals = self._decay_intervals()
        if intervals is not None:
            return [mom * (1 + self.decay_mom_rate * intervals) for mom in self.max_moms]
        height = self._height()
        return [high - (high - low) * height for low, high in zip(self.min_moms, self.max_moms, strict=True)]

    def _apply(self) -> None:
        super()._apply()
        if not self.cycle_momentum:
            return
        # As in DeepSpeed: what is set before the first step is not what the cycle has there.
        momenta = self.min_moms if self.last_batch_iteration < 0 else self._momenta()
        for group, momentum in zip(self.optimizer.param_groups, momenta, strict=True):
            group["betas"] = (momentum, 0.99)


_TYPES: dict[str, type[Schedule]] = {
    kind.__name__: kind for kind in (WarmupLR, WarmupDecayLR, WarmupCosineLR, LRRangeTest, OneCycle)
}


def build_scheduler(config: SchedulerConfig, optimizer: Any) -> Schedule:
    """Build the schedule that the config names.

    Raises:
        ConfigError: unknown type or entry in `params`, or a value out of range.
    """
    if config.type not in _TYPES:
        raise ConfigError(f"config key 'scheduler.type': {unknown_name('scheduler', config.type, _TYPES)}")
    return construct(_TYPES[config.type], optimizer, config.params, "scheduler.params")
