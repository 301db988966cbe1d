"""Counts floating-point operations of forward passes by module, and times them. Printing is in report.py.

torch's FlopCounterMode sees every operation that reaches the device and counts matrix products, convolutions
and attention, two operations for a multiplication with addition; operations element by element, which DeepSpeed
counts too, are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from xtrain.activation_checkpointing import random_states
from xtrain.base.errors import ConfigError
from xtrain.base.files import write_text
from xtrain.base.log import logger
from xtrain.metrics.flops_profiler import report
from xtrain.metrics.flops_profiler.units import (
    duration_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)
from xtrain.zero.home import full_shape


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_MORE_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""Operations that torch has no formula for."""


def _make_counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)


class ModuleCost:
    """What the calls of one module cost, its children included.

    Attributes:
        called: whether it was called itself.
        flops: floating-point operations.
        seconds: latency.
        params: elements of its parameters, whole ones in ZeRO stage 3 too.
    """

    def __init__(self, params: int) -> None:
        self.called = False
        self.flops = 0
        self.seconds = 0.0
        self.params = params


class FlopsProfiler:
    """Profiles the forward passes of a model between `start_profile` and `stop_profile`.

    Args:
        model: any module.
        ds_engine: the engine that trains it; the report then says what a whole step costs.
        recompute_fwd_factor: part of forward that backward computes again.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:
        self.model = model
        self.ds_engine = ds_engine
        self.recompute_fwd_factor = recompute_fwd_factor
        self.started = False
        # What the last printed profile has found, for who reads it when the counters are reset.
        self.flops = self.macs = self.params = 0
        self._costs: dict[nn.Module, ModuleCost] = {}
        self._counter: FlopCounterMode | None = None
        self._handles: list[Any] = []
        self._running: list[tuple[int, float]] = []

    # ---------------------------------------------------------------- measuring

    def start_profile(self, ignore_list: Collection[type[nn.Module]] | None = None) -> None:
        """Forget the last profile and begin one; latencies include what counting costs (some µs an operation).

        Args:
            ignore_list: classes of modules that get no figures of their own.
        """
        self.stop_profile()
        self.reset_profile()
        self._hook(ignore_list or ())
        with (
            _make_counter()
        ):  # its first use loads torch's decompositions, which would be charged to a module
            nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 1, 1))
        self._counter = _make_counter()
        self._counter.__enter__()
        self.started = True

    def _start_clock(self, ignore_list: Collection[type[nn.Module]] | None = None) -> None:
        """Forget latencies, and measure them without counting; the counts stay."""
        self.stop_profile()
        for cost in self._costs.values():
            cost.seconds = 0.0
        self._hook(ignore_list or ())

    def _hook(self, ignored: Collection[type[nn.Module]]) -> None:
        synchronize = random_states.runtime().synchronize

        def counted() -> int:
            return self._counter.get_total_flops() if self._counter is not None else 0

        def before(*_: Any) -> None:
            synchronize()
            self._running.append((counted(), time.perf_counter()))

        def after(module: nn.Module, *_: Any) -> None:
            synchronize()
            flops, started = self._running.pop()
            cost = self._costs[module]
            cost.called = True
            cost.flops += counted() - flops
            cost.seconds += time.perf_counter() - started

        for module in self.model.modules():
            if type(module) not in ignored:
                self._handles.append(module.register_forward_pre_hook(before, prepend=True))
                self._handles.append(module.register_forward_hook(after, always_call=True))

    def stop_profile(self) -> None:
        """Stop measuring; the figures stay."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counter = None
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def reset_profile(self) -> None:
        """Set all figures to zero."""
        self._costs = {
            module: ModuleCost(sum(full_shape(param).numel() for param in module.parameters()))
            for module in self.model.modules()
        }

    def end_profile(self) -> None:
        """Stop measuring; the figures stay until the next profile."""
        self.stop_profile()
        self.started = False

    # ---------------------------------------------------------------- results

    def cost(self, module: nn.Module) -> ModuleCost:
        """Figures of one module; one that was not called itself (a ModuleList) is the sum of its children.

        Raises:
            ConfigError: nothing was profiled.
        """
        if not self._costs:
            raise ConfigError("the flops profiler has no figures yet: call start_profile() and run the model")
        own = self._costs[module]
        if own.called:
            return own
        total = ModuleCost(own.params)
        for child in module.children():
            part = self.cost(child)
            total.flops += part.flops
            total.seconds += part.seconds
        return total

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Floating-point operations of the forward pass, a number or "1.5 M"."""
        flops = self.cost(self.model).flops
        return number_to_string(flops) if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Multiply-accumulate operations of the forward pass, half the floating-point operations."""
        macs = self.cost(self.model).flops // 2
        return macs_to_string(macs) if as_string else macs

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Seconds of the forward pass."""
        seconds = self.cost(self.model).seconds
        return duration_to_string(seconds) if as_string else seconds

    def get_total_params(self, as_string: bool = False) -> Any:
        """Elements of the model's parameters; in ZeRO stage 3, where each rank keeps a part, of the whole ones."""
        params = self.cost(self.model).params
        return params_to_string(params) if as_string else params

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Print the profile, or write it to a file.

        Args:
            profile_step: shown in the heading.
            module_depth: depth down to which classes of modules are summed up; -1: all.
            top_modules: classes listed at each depth.
            detailed: list every module.
            output_file: written as a whole; None or "": standard output.
        """
        self.flops, self.macs = self.get_total_flops(), self.get_total_macs()
        self.params = self.get_total_params()
        parts = [report.summary(self, profile_step), report.aggregated(self, module_depth, top_modules)]
        text = "\n\n".join([*parts, report.modules(self)] if detailed else parts) + "\n"
        if output_file:
            path = Path(output_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
        else:
            print(text, flush=True)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Print the part of the profile that sums up classes of modules."""
        print(report.aggregated(self, module_depth, top_modules), flush=True)


def get_model_profile(
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Collection[Any] = (),
    kwargs: dict[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Collection[type[nn.Module]] | None = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Profile one inference of a model, without an engine. It is run `warm_up` times, once to count and once to time.

    Args:
        input_shape: shape of the one argument, which is then made up (ones); or `args` and `kwargs`.
        print_profile, detailed, module_depth, top_modules, output_file: see `FlopsProfiler.print_model_profile`.
        warm_up: runs before the measured one.
        as_string: return text such as "1.5 M".
        ignore_modules: classes of modules that get no figures of their own.
        mode: "forward", or "generate" for `model.generate`.

    Returns:
        (floating-point operations, multiply-accumulate operations, parameters).

    Raises:
        ConfigError: no input, or an unknown mode.
    """
    if mode not in ("forward", "generate"):
        raise ConfigError(f"get_model_profile(mode={mode!r}): use 'forward' or 'generate'")
    if input_shape is not None:
        like = next(model.parameters(), torch.ones(()))
        args = [torch.ones(input_shape, dtype=like.dtype, device=like.device)]
    elif not args and not kwargs:
        raise ConfigError("get_model_profile() needs input_shape, args or kwargs")
    run: Callable[..., Any] = getattr(model, "generate" if mode == "generate" else "__call__")
    profiler, training = FlopsProfiler(model), model.training
    model.eval()
    try:
        logger.info("flops profiler: warming up")
        for _ in range(warm_up):
            run(*args, **(kwargs or {}))
        profiler.start_profile(ignore_modules)
        run(*args, **(kwargs or {}))
        profiler._start_clock(ignore_modules)
        run(*args, **(kwargs or {}))
    finally:
        profiler.end_profile()
        model.train(training)
    if print_profile:
        profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
    return (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )
