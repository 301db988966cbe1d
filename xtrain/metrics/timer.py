"""DeepSpeed's `deepspeed.utils.timer`: timers by name, and samples per second.

Clocks are read after waiting for the device, so that a phase is charged with the work it started. When
which timer runs is decided in metrics.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from xtrain.activation_checkpointing import random_states
from xtrain.backends import host
from xtrain.backends.backend import RuntimeFacet
from xtrain.base.errors import ConfigError
from xtrain.base.log import logger, print_dist

FORWARD_MICRO_TIMER = "fwd_microstep"
FORWARD_GLOBAL_TIMER = "fwd"
BACKWARD_MICRO_TIMER = "bwd_microstep"
BACKWARD_GLOBAL_TIMER = "bwd"
BACKWARD_INNER_MICRO_TIMER = "bwd_inner_microstep"
BACKWARD_INNER_GLOBAL_TIMER = "bwd_inner"
BACKWARD_REDUCE_MICRO_TIMER = "bwd_allreduce_microstep"
BACKWARD_REDUCE_GLOBAL_TIMER = "bwd_allreduce"
STEP_MICRO_TIMER = "step_microstep"
STEP_GLOBAL_TIMER = "step"
TIME_EPSILON = 1e-6

_GB = 2**30


def trim_mean(data: Sequence[float], trim_percent: float) -> float:
    """The mean without the given part (0 to 0.5) of the smallest and of the largest values; 0 of nothing."""
    if not 0.0 <= trim_percent < 0.5:
        raise ConfigError(f"trim_mean() trims 0 to 0.5 of the values at each end, not {trim_percent}")
    cut = round(len(data) * trim_percent)
    kept = sorted(data)[cut : len(data) - cut]
    return sum(kept) / len(kept) if kept else 0.0


class _Timer:
    """Adds up the time between `start` and `stop`; milliseconds.

    Args:
        name: shown in messages.
        synchronize: waits for the device.
    """

    def __init__(self, name: str, synchronize: Callable[[], None] = lambda: None) -> None:
        self.name_ = name
        self.started_ = False
        self._synchronize = synchronize
        self._start = 0.0
        self._records: list[float] = []

    def start(self) -> None:
        """Begin an interval."""
        if self.started_:
            raise ConfigError(f"timer {self.name_!r} was started twice: stop it first")
        self._synchronize()
        self._start = time.perf_counter()
        self.started_ = True

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """End an interval.

        Args:
            reset: forget the intervals before it.
            record: accepted: every interval counts for `mean`.
        """
        if not self.started_:
            raise ConfigError(f"timer {self.name_!r} was stopped, but it is not running")
        self._synchronize()
        interval = 1000 * (time.perf_counter() - self._start)
        if reset:
            self._records = []
        self._records.append(interval)
        self.started_ = False

    def reset(self) -> None:
        """Forget everything; a running interval is given up."""
        self.started_ = False
        self._records = []

    def elapsed(self, reset: bool = True) -> float:
        """Sum of the intervals; a running one counts up to now, and goes on."""
        running = self.started_
        if running:
            self.stop()
        total = sum(self._records)
        if reset:
            self.reset()
        if running:
            self.start()
        return total

    def mean(self) -> float:
        """Mean interval, without the tenth of the shortest and of the longest."""
        return trim_mean(self._records, 0.1)


class SynchronizedWallClockTimer:
    """Timers by name, made when first asked for: `timers("load").start()`.

    Args:
        runtime: of the device to wait for; None: that of the backend in use.
    """

    Timer = _Timer

    def __init__(self, runtime: RuntimeFacet | None = None) -> None:
        self._runtime = runtime
        self.timers: dict[str, _Timer] = {}

    def get_timers(self) -> dict[str, _Timer]:
        """Every timer by its name."""
        return self.timers

    def __call__(self, name: str) -> _Timer:
        if name not in self.timers:
            self.timers[name] = _Timer(name, (self._runtime or random_states.runtime()).synchronize)
        return self.timers[name]

    @staticmethod
    def memory_usage() -> str:
        """Memory on the device, in GB (2^30 bytes), as part of a line."""
        use = random_states.runtime().memory()
        return (
            f" | mem_allocated: {use.allocated / _GB:.4f} GB | max_mem_allocated: {use.peak_allocated / _GB:.4f} GB"
            f" | cache_allocated: {use.reserved / _GB:.4f} GB | max_cache_allocated: {use.peak_reserved / _GB:.4f} GB"
        )

    def log(
        self,
        names: Iterable[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Print the sums of the named timers that exist, in milliseconds, on the given ranks (None: rank 0).

        Args:
            normalizer: every sum is divided by it.
            reset: start the sums again.
            memory_breakdown: add `memory_usage()`.
        """
        parts = [
            f" | {name}: {self.timers[name].elapsed(reset=reset) / normalizer:.2f}"
            for name in names
            if name in self.timers
        ]
        memory = self.memory_usage() if memory_breakdown else ""
        print_dist("time (ms)" + "".join(parts) + memory, ranks=ranks or [0])

    def get_mean(self, names: Iterable[str], normalizer: float = 1.0, reset: bool = True) -> dict[str, float]:
        """Mean interval of the named timers that exist, in microseconds as in DeepSpeed, divided by `normalizer`.

        Args:
            reset: start again.
        """
        means = {name: 1000 * self.timers[name].mean() / normalizer for name in names if name in self.timers}
        if reset:
            for name in means:
                self.timers[name].reset()
        return means


class NoopTimer:
    """Has the methods of SynchronizedWallClockTimer and measures nothing."""

    class Timer:
        """Has the methods of a timer."""

        def start(self) -> None:
            """Nothing."""

        def stop(self, **kwargs: Any) -> None:
            """Nothing."""

        def reset(self) -> None:
            """Nothing."""

        def elapsed(self, **kwargs: Any) -> float:
            """Always 0."""
            return 0

        def mean(self) -> float:
            """Always 0."""
            return 0

    def __init__(self) -> None:
        self.timer = self.Timer()

    def __call__(self, name: str) -> NoopTimer.Timer:
        return self.timer

    def get_timers(self) -> dict[str, Any]:
        """None."""
        return {}

    def log(self, names: Iterable[str], *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def get_mean(self, names: Iterable[str], *args: Any, **kwargs: Any) -> None:
        """Nothing."""


class _ThroughputSettings(Protocol):
    @property
    def enabled(self) -> bool: ...
    @property
    def synchronized(self) -> bool: ...


class ThroughputTimer:
    """Samples per second: `start` before a micro-batch, `stop` after it.

    Args:
        config: has `enabled`, and `synchronized`: wait for the device before reading the clock.
        batch_size: samples per step.
        start_step: steps that are not measured, because the first ones are slow.
        steps_per_output: steps between two lines; None or 0: none.
        monitor_memory: add a line about the host's memory.
        logging_fn: takes a line; None: the logger.
        runtime: of the device to wait for; None: that of the backend in use.
    """

    def __init__(
        self,
        config: _ThroughputSettings,
        batch_size: int | None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], None] | None = None,
        runtime: RuntimeFacet | None = None,
    ) -> None:
        self.config = config
        self.batch_size = batch_size or 1
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.monitor_memory = monitor_memory
        self.logging = logging_fn or logger.info
        self._runtime = runtime
        self.started = False
        self.initialized = False
        """Whether `start` was ever called."""
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.start_time = self.end_time = self.total_elapsed_time = self.step_elapsed_time = 0.0

    def update_epoch_count(self) -> None:
        """A new epoch begins."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def _now(self) -> float:
        if self.config.synchronized:
            (self._runtime or random_states.runtime()).synchronize()
        return time.perf_counter()

    def start(self) -> None:
        """A micro-batch begins."""
        if self.config.enabled:
            self.started = self.initialized = True
            if self.global_step_count >= self.start_step:
                self.start_time = self._now()

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """A micro-batch has ended; nothing without a `start`.

        Args:
            global_step: it was the last of its step.
            report_speed: write a line if `steps_per_output` says so.
        """
        if not self.config.enabled or not self.started:
            return
        self.started = False
        self.micro_step_count += 1
        measured = self.global_step_count >= self.start_step
        if measured:
            self.end_time = self._now()
            duration = self.end_time - self.start_time
            self.total_elapsed_time += duration
            self.step_elapsed_time += duration
        if not global_step:
            return
        self.global_step_count += 1
        if measured:
            every = self.steps_per_output
            if report_speed and every and self.global_step_count % every == 0:
                self._report()
            self.step_elapsed_time = 0.0

    def _report(self) -> None:
        place = f"epoch={self.epoch_count}/micro_step={self.micro_step_count}/global_step={self.global_step_count}"
        use = (self._runtime or random_states.runtime()).memory()
        current = self.batch_size / (self.step_elapsed_time + TIME_EPSILON)
        self.logging(
            f"{place}, RunningAvgSamplesPerSec={self.avg_samples_per_sec()}, CurrSamplesPerSec={current}, "
            f"MemAllocated={use.allocated / _GB:.2f}GB, MaxMemAllocated={use.peak_allocated / _GB:.2f}GB"
        )
        if self.monitor_memory:
            used, total = host.in_use()
            self.logging(f"{place}, vm %: {100 * used / total:.1f}")

    def avg_samples_per_sec(self) -> float:
        """Samples per second over all measured steps; minus infinity before the first."""
        steps = self.global_step_count - self.start_step
        if steps <= 0:
            return float("-inf")
        return self.batch_size * steps / (self.total_elapsed_time + TIME_EPSILON)
