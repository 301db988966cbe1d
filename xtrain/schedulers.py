"""DeepSpeed's learning-rate schedules, with their exact step numbering.

Source: https://www.deepspeed.ai/docs/schedulers-api/ and the behaviour of deepspeed 0.19.8: the first
optimizer step uses `warmup_min_lr`, and the n-th call of `step()` sets the rate for iteration n - 1,
so the second optimizer step uses the schedule's value at 0.
"""

from __future__ import annotations

import math
from typing import Any

from xtrain.config.arguments import construct
from xtrain.config.schema import SchedulerConfig
from xtrain.errors import ConfigError, NotImplementedYetError, unknown_name


class WarmupLR:
    """Raise the rate from `warmup_min_lr` to `warmup_max_lr` over `warmup_num_steps` steps, then keep it.

    Args:
        optimizer: anything with `param_groups`.
        warmup_min_lr, warmup_max_lr: a number, or one for each group; a maximum of None takes the
            groups' own rates.
        warmup_num_steps: at least 2 steps are used.
        warmup_type: "log" or "linear".
        last_batch_iteration: iteration to continue from; -1 starts.
    """

    def __init__(
        self,
        optimizer: Any,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = None,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        if not isinstance(warmup_num_steps, int) or warmup_num_steps <= 0:
            raise ConfigError(f"warmup_num_steps must be a positive integer, got {warmup_num_steps!r}")
        if warmup_type not in ("log", "linear"):
            raise ConfigError(f"warmup_type: {unknown_name('schedule', str(warmup_type), ('log', 'linear'))}")
        self.optimizer = optimizer
        if warmup_max_lr is None:
            warmup_max_lr = [group["lr"] for group in optimizer.param_groups]
        self.min_lrs = self._per_group("warmup_min_lr", warmup_min_lr)
        self.max_lrs = self._per_group("warmup_max_lr", warmup_max_lr)
        self.warmup_num_steps = max(2, warmup_num_steps)
        self.warmup_type = warmup_type
        self.last_batch_iteration = last_batch_iteration
        self._last_lr: list[float] = []
        self._apply()

    def _per_group(self, name: str, value: float | list[float]) -> list[float]:
        count = len(self.optimizer.param_groups)
        if isinstance(value, list | tuple):
            if len(value) != count:
                raise ConfigError(f"{name} has {len(value)} values for {count} parameter groups")
            return list(value)
        return [value] * count

    def _warmup(self) -> float:
        if self.warmup_type == "linear":
            return self.last_batch_iteration / self.warmup_num_steps
        return math.log(self.last_batch_iteration + 1) / math.log(self.warmup_num_steps)

    def _after_warmup(self) -> float:
        return 1.0

    def get_lr(self) -> list[float]:
        """The rate of each group at `last_batch_iteration`."""
        if self.last_batch_iteration < 0:
            return self.min_lrs
        warming = self.last_batch_iteration < self.warmup_num_steps
        gamma = self._warmup() if warming else self._after_warmup()
        return [low + (high - low) * gamma for low, high in zip(self.min_lrs, self.max_lrs, strict=True)]

    def get_last_lr(self) -> list[float]:
        """The rate of each group as last set."""
        return self._last_lr

    def _apply(self) -> None:
        self._last_lr = list(self.get_lr())
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
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


class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then decay linearly to zero at `total_num_steps`."""

    def __init__(
        self,
        optimizer: Any,
        total_num_steps: int,
        warmup_min_lr: float | list[float] = 0.0,
        warmup_max_lr: float | list[float] | None = 0.001,
        warmup_num_steps: int = 1000,
        warmup_type: str = "log",
        last_batch_iteration: int = -1,
    ) -> None:
        if not isinstance(total_num_steps, int) or total_num_steps <= 0:
            raise ConfigError(f"total_num_steps must be a positive integer, got {total_num_steps!r}")
        self.total_num_steps = total_num_steps
        super().__init__(
            optimizer, warmup_min_lr, warmup_max_lr, warmup_num_steps, warmup_type, last_batch_iteration
        )

    def _after_warmup(self) -> float:
        left = self.total_num_steps - self.last_batch_iteration
        return max(0.0, left / max(1.0, self.total_num_steps - self.warmup_num_steps))


_TYPES: dict[str, type[WarmupLR]] = {"WarmupLR": WarmupLR, "WarmupDecayLR": WarmupDecayLR}
_NOT_YET = ("WarmupCosineLR", "OneCycle", "LRRangeTest")


def build_scheduler(config: SchedulerConfig, optimizer: Any) -> WarmupLR:
    """Build the schedule that the config names.

    Raises:
        ConfigError: unknown type or entry in `params`, or a value out of range.
        NotImplementedYetError: a type that DeepSpeed has and xtrain has not yet.
    """
    if config.type in _NOT_YET:
        raise NotImplementedYetError(
            f"scheduler type {config.type!r}",
            f"use {' or '.join(_TYPES)}, or pass a torch scheduler to initialize()",
        )
    if config.type not in _TYPES:
        raise ConfigError(f"config key 'scheduler.type': {unknown_name('scheduler', config.type, _TYPES)}")
    return construct(_TYPES[config.type], optimizer, config.params, "scheduler.params")
