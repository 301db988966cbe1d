"""What observes an engine: monitors, timers, profiler, memory lines, communication log. Nothing of it changes training.

The engine tells when a phase begins and ends; what is then measured is decided here. A phase that nobody
measures is a null context.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from xtrain import comm
from xtrain.config import XtrainConfig
from xtrain.config.instruments import ThroughputConfig
from xtrain.log import log_dist
from xtrain.memory import see_memory_usage
from xtrain.monitor.config import DeepSpeedMonitorConfig
from xtrain.monitor.monitor import Event, MonitorMaster
from xtrain.profiling.flops_profiler import FlopsProfiler
from xtrain.utils.timer import (
    BACKWARD_GLOBAL_TIMER,
    BACKWARD_INNER_GLOBAL_TIMER,
    BACKWARD_INNER_MICRO_TIMER,
    BACKWARD_MICRO_TIMER,
    BACKWARD_REDUCE_GLOBAL_TIMER,
    BACKWARD_REDUCE_MICRO_TIMER,
    FORWARD_GLOBAL_TIMER,
    FORWARD_MICRO_TIMER,
    STEP_GLOBAL_TIMER,
    STEP_MICRO_TIMER,
    SynchronizedWallClockTimer,
    ThroughputTimer,
)

if TYPE_CHECKING:
    from xtrain.engine import XtrainEngine

_PHASES = {
    # phase: timer that is reset at every micro-batch, timer that is reset at every step, tag
    "forward": (FORWARD_MICRO_TIMER, FORWARD_GLOBAL_TIMER, "forward"),
    "backward": (BACKWARD_MICRO_TIMER, BACKWARD_GLOBAL_TIMER, "backward"),
    "differentiation": (BACKWARD_INNER_MICRO_TIMER, BACKWARD_INNER_GLOBAL_TIMER, "backward_inner"),
    "reduction": (BACKWARD_REDUCE_MICRO_TIMER, BACKWARD_REDUCE_GLOBAL_TIMER, "backward_allreduce"),
    "step": (STEP_MICRO_TIMER, STEP_GLOBAL_TIMER, "step"),
}
_NOTHING: AbstractContextManager[Any] = nullcontext()


class Instruments:
    """The instruments of one engine, as its config asks for them.

    Attributes:
        monitor: where scalars go.
        timers: by DeepSpeed's names; they run under `wall_clock_breakdown`.
        tput_timer: samples per second.
        flops_profiler: None unless enabled.
        last_times: milliseconds of each timer at the end of the last `step()`.
    """

    def __init__(self, engine: XtrainEngine) -> None:
        config: XtrainConfig = engine.xtrain_config
        values = config.values
        self._engine = weakref.ref(engine)
        self._first = engine.global_rank == 0
        self.last_times: dict[str, float] = {}
        self._timing, self._memory = values.wall_clock_breakdown, values.memory_breakdown
        self._losses: list[torch.Tensor] = []
        if values.comms_logger.enabled:
            comm.configure(**values.comms_logger.model_dump())
        comm.comms_logger.synchronize = engine.backend.runtime.synchronize
        self.monitor = MonitorMaster(DeepSpeedMonitorConfig(values))
        self.timers = SynchronizedWallClockTimer(engine.backend.runtime)
        asked = bool(values.steps_per_print) or "timers" in values.model_fields_set
        throughput = values.timers.throughput
        self.tput_timer = ThroughputTimer(
            ThroughputConfig(enabled=throughput.enabled, synchronized=throughput.synchronized and asked),
            engine.train_batch_size(),
            steps_per_output=values.steps_per_print,
            logging_fn=lambda line: log_dist(line, ranks=[0]),
            runtime=engine.backend.runtime,
        )
        self._profile = values.flops_profiler
        self._profiling = self._profile.enabled and self._first
        self.flops_profiler: FlopsProfiler | None = None
        if self._profile.enabled:
            factor = self._profile.recompute_fwd_factor
            self.flops_profiler = FlopsProfiler(engine.module, weakref.proxy(engine), factor)

    # ---------------------------------------------------------------- phases

    def forward(self) -> AbstractContextManager[Any]:
        """The forward pass of a micro-batch; evaluations (without gradients) are not measured."""
        if not torch.is_grad_enabled():
            return _NOTHING
        self.tput_timer.start()
        if not (self._timing or self._memory or self._profiling):
            return _NOTHING
        return self._forward()

    @contextmanager
    def _forward(self) -> Iterator[None]:
        engine = self._engine()
        assert engine is not None
        profiler = self.flops_profiler
        # The first forward of the step alone: the next ones would show the same.
        profiled = (
            self._profiling
            and profiler is not None
            and not profiler.started
            and engine.global_steps == self._profile.profile_step
        )
        with self._measured("forward"):
            if not profiled or profiler is None:
                yield
                return
            profiler.start_profile()
            try:
                yield
            except BaseException:
                profiler.end_profile()  # the next forward is profiled instead
                raise
            profiler.stop_profile()

    def backward(self, loss: torch.Tensor) -> AbstractContextManager[Any]:
        """The backward pass of a micro-batch and the reduction of its gradients."""
        if self.monitor.enabled and self._first:
            self._losses.append(loss.detach())
        return self._measured("backward") if self._timing or self._memory else _NOTHING

    def differentiation(self) -> AbstractContextManager[Any]:
        """The part of `backward` in which gradients are computed; the rest is the wait for their reduction."""
        return self._differentiation() if self._timing else _NOTHING

    @contextmanager
    def _differentiation(self) -> Iterator[None]:
        self._start("differentiation")
        yield
        self._stop("differentiation")
        self._start("reduction")

    def step(self) -> AbstractContextManager[Any]:
        """What `step()` does."""
        return self._measured("step") if self._timing or self._memory else _NOTHING

    @contextmanager
    def _measured(self, phase: str) -> Iterator[None]:
        see_memory_usage(f"Engine before {phase}", force=self._memory)
        if self._timing:
            self._start(phase)
        try:
            yield
        except BaseException:
            self._give_up()
            raise
        if self._timing:
            if phase == "backward":
                self._stop("reduction")
            self._stop(phase)
        see_memory_usage(f"Engine after {phase}", force=self._memory)

    def _start(self, phase: str) -> None:
        for name in _PHASES[phase][:2]:
            self.timers(name).start()

    def _stop(self, phase: str) -> None:
        for name in _PHASES[phase][:2]:
            self.timers(name).stop()

    def _give_up(self) -> None:
        """A phase has raised: its micro-batch is not measured."""
        for micro, whole, _ in _PHASES.values():
            self.timers(micro).reset()
            self.timers(whole).reset()

    def discard(self) -> None:
        """The gradients of the running window were given up."""
        self._losses.clear()

    # ---------------------------------------------------------------- reports

    def after_micro_batch(self, boundary: bool) -> None:
        """`step()` has ended; write what there is to write.

        Args:
            boundary: it was an update.
        """
        engine = self._engine()
        assert engine is not None
        self.tput_timer.batch_size = engine.train_batch_size()  # the script may have changed it
        self.tput_timer.stop(global_step=boundary)
        if self._timing:
            self.last_times = {
                name: self.timers(name).elapsed(reset=False)
                for micro, whole, _ in _PHASES.values()
                for name in (micro, whole)
            }
        if boundary:
            self._after_step(engine)
        if self._timing:
            micro = [names[0] for names in _PHASES.values()]
            self.timers.log(micro, memory_breakdown=self._memory)
            if boundary:
                self.timers.log([names[1] for names in _PHASES.values()])

    def _after_step(self, engine: XtrainEngine) -> None:
        if self.monitor.enabled and self._first:
            self.monitor.write_events(self._events(engine))
            self._losses.clear()
        if self._profiling and self.flops_profiler is not None and self.flops_profiler.started:
            section = self._profile
            self.flops_profiler.print_model_profile(
                section.profile_step,
                section.module_depth,
                section.top_modules,
                section.detailed,
                section.output_file,
            )
            self.flops_profiler.end_profile()
            self._profiling = False

    def _events(self, engine: XtrainEngine) -> list[Event]:
        """The scalars of a step, under DeepSpeed's tags."""
        scalars: dict[str, float] = {}
        if self._losses:
            means = [loss.float().mean() for loss in self._losses]
            scalars["train_loss"] = torch.stack(means).mean().item()
        if rates := engine.get_lr():
            scalars["lr"] = float(rates[0])
        if engine.fp16_enabled():
            scalars["loss_scale"] = engine.loss_scale()
        if self._timing:
            for _, whole, tag in _PHASES.values():
                scalars[f"elapsed_time_ms_{tag}"] = self.last_times[whole]
        return [(f"Train/Samples/{name}", value, engine.global_samples) for name, value in scalars.items()]

    def close(self) -> None:
        """Finish the monitors."""
        self.monitor.close()
