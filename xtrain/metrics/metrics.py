"""What observes an engine: monitors, timers, profiler, memory lines, communication log. Nothing of it changes training.

They register at the engine's hooks, as the config asks for them.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from xtrain import comm
from xtrain.base.log import log_dist
from xtrain.config.metrics import ThroughputConfig
from xtrain.engine.hooks import Hooks
from xtrain.metrics.flops_profiler.profiler import FlopsProfiler
from xtrain.metrics.memory_usage import see_memory_usage
from xtrain.metrics.monitor.config import DeepSpeedMonitorConfig
from xtrain.metrics.monitor.monitor import Event, MonitorMaster
from xtrain.metrics.timer import (
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
from xtrain.zero.train_state import TrainState

_PHASES = {
    # phase: timer that is reset at every micro-batch, timer that is reset at every step, tag
    "forward": (FORWARD_MICRO_TIMER, FORWARD_GLOBAL_TIMER, "forward"),
    "backward": (BACKWARD_MICRO_TIMER, BACKWARD_GLOBAL_TIMER, "backward"),
    "differentiation": (BACKWARD_INNER_MICRO_TIMER, BACKWARD_INNER_GLOBAL_TIMER, "backward_inner"),
    "reduction": (BACKWARD_REDUCE_MICRO_TIMER, BACKWARD_REDUCE_GLOBAL_TIMER, "backward_allreduce"),
    "step": (STEP_MICRO_TIMER, STEP_GLOBAL_TIMER, "step"),
}


class Metrics:
    """The metrics of one engine.

    Attributes:
        monitor: where scalars go.
        timers: by DeepSpeed's names; they run under `wall_clock_breakdown`.
        tput_timer: samples per second.
        flops_profiler: None unless enabled.
        last_times: milliseconds of each timer at the end of the last `step()`.
    """

    def __init__(self, state: TrainState, hooks: Hooks, engine: Any) -> None:
        values, runtime = state.values, state.backend.runtime
        self._first = state.global_rank == 0
        self.last_times: dict[str, float] = {}
        self._timing, self._memory = values.wall_clock_breakdown, values.memory_breakdown
        self._losses: list[torch.Tensor] = []
        self._in_profile = False
        if values.comms_logger.enabled:
            comm.configure(**values.comms_logger.model_dump())
        comm.comms_logger.synchronize = runtime.synchronize
        self.monitor = MonitorMaster(DeepSpeedMonitorConfig(values))
        self.timers = SynchronizedWallClockTimer(runtime)
        asked = bool(values.steps_per_print) or "timers" in values.model_fields_set
        throughput = values.timers.throughput
        self.tput_timer = ThroughputTimer(
            ThroughputConfig(enabled=throughput.enabled, synchronized=throughput.synchronized and asked),
            state.batch_sizes.train,
            steps_per_output=values.steps_per_print,
            logging_fn=lambda line: log_dist(line, ranks=[0]),
            runtime=runtime,
        )
        self._profile = values.flops_profiler
        self._profiling = self._profile.enabled and self._first
        self.flops_profiler: FlopsProfiler | None = None
        if self._profile.enabled:
            factor = self._profile.recompute_fwd_factor
            self.flops_profiler = FlopsProfiler(state.module, weakref.proxy(engine), factor)
        self._register(hooks)

    def _register(self, hooks: Hooks) -> None:
        hooks.before_forward.append(self._before_forward)
        if self._profiling:
            hooks.before_forward.append(self._start_profile)
            hooks.after_forward.append(self._stop_profile)
            hooks.on_error.append(self._end_profile)
        if self._timing or self._memory:
            hooks.after_forward.append(
                lambda state, _: self._end("forward") if torch.is_grad_enabled() else None
            )
            hooks.before_backward.append(self._before_backward)
            hooks.after_backward.append(self._after_backward)
            hooks.before_step.append(lambda *_: self._begin("step"))
            hooks.on_error.append(self._give_up)
        if self._timing:
            hooks.after_differentiation.append(self._after_differentiation)
        if self.monitor.enabled and self._first:
            hooks.before_backward.append(lambda state, loss: self._losses.append(loss.detach()))
            hooks.on_discard.append(lambda _: self._losses.clear())
        hooks.after_step.append(self._after_micro_batch)
        hooks.on_destroy.append(lambda _: self.monitor.close())

    # ---------------------------------------------------------------- phases

    def _before_forward(self, state: TrainState, *_: Any) -> None:
        """Evaluations (without gradients) are not measured."""
        if torch.is_grad_enabled():
            self.tput_timer.start()
            if self._timing or self._memory:
                self._begin("forward")

    def _start_profile(self, state: TrainState, *_: Any) -> None:
        """The first forward of the step alone: the next ones would show the same."""
        profiler = self.flops_profiler
        wanted = torch.is_grad_enabled() and state.counters.global_steps == self._profile.profile_step
        if wanted and self._profiling and profiler is not None and not profiler.started:
            self._in_profile = True
            profiler.start_profile()

    def _stop_profile(self, *_: Any) -> None:
        if self._in_profile and self.flops_profiler is not None:
            self._in_profile = False
            self.flops_profiler.stop_profile()

    def _end_profile(self, _: TrainState) -> None:
        """The profiled forward has raised: the next one is profiled instead."""
        if self._in_profile and self.flops_profiler is not None:
            self._in_profile = False
            self.flops_profiler.end_profile()

    def _before_backward(self, *_: Any) -> None:
        self._begin("backward")
        if self._timing:
            self._start("differentiation")

    def _after_differentiation(self, _: TrainState) -> None:
        """What is left of backward is the wait for the reduction."""
        self._stop("differentiation")
        self._start("reduction")

    def _after_backward(self, _: TrainState) -> None:
        if self._timing:
            self._stop("reduction")
        self._end("backward")

    def _begin(self, phase: str) -> None:
        see_memory_usage(f"Engine before {phase}", force=self._memory)
        if self._timing:
            self._start(phase)

    def _end(self, phase: str) -> None:
        if self._timing:
            self._stop(phase)
        see_memory_usage(f"Engine after {phase}", force=self._memory)

    def _start(self, phase: str) -> None:
        for name in _PHASES[phase][:2]:
            self.timers(name).start()

    def _stop(self, phase: str) -> None:
        for name in _PHASES[phase][:2]:
            self.timers(name).stop()

    def _give_up(self, _: TrainState) -> None:
        """A phase has raised: its micro-batch is not measured."""
        for micro, whole, _tag in _PHASES.values():
            self.timers(micro).reset()
            self.timers(whole).reset()

    # ---------------------------------------------------------------- reports

    def _after_micro_batch(self, state: TrainState, boundary: bool) -> None:
        """`step()` has ended; write what there is to write."""
        if self._timing or self._memory:
            self._end("step")
        self.tput_timer.batch_size = state.batch_sizes.train  # the script may have changed it
        self.tput_timer.stop(global_step=boundary)
        if self._timing:
            self.last_times = {
                name: self.timers(name).elapsed(reset=False)
                for micro, whole, _ in _PHASES.values()
                for name in (micro, whole)
            }
        if boundary:
            self._after_update(state)
        if self._timing:
            micro = [names[0] for names in _PHASES.values()]
            self.timers.log(micro, memory_breakdown=self._memory)
            if boundary:
                self.timers.log([names[1] for names in _PHASES.values()])

    def _after_update(self, state: TrainState) -> None:
        if self.monitor.enabled and self._first:
            self.monitor.write_events(self._events(state))
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

    def _events(self, state: TrainState) -> list[Event]:
        """The scalars of a step, under DeepSpeed's tags."""
        scalars: dict[str, float] = {}
        if self._losses:
            means = [loss.float().mean() for loss in self._losses]
            scalars["train_loss"] = torch.stack(means).mean().item()
        if rates := state.rates():
            scalars["lr"] = float(rates[0])
        if state.values.fp16.enabled and state.optimizer is not None:
            scalars["loss_scale"] = state.optimizer.loss_scale
        if self._timing:
            for _, whole, tag in _PHASES.values():
                scalars[f"elapsed_time_ms_{tag}"] = self.last_times[whole]
        samples = state.counters.global_samples
        return [(f"Train/Samples/{name}", value, samples) for name, value in scalars.items()]
