"""The text of a profile: the whole step, classes of modules, every module."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, Protocol

from torch import nn

from xtrain.metrics.flops_profiler.units import (
    duration_to_string,
    flops_to_string,
    macs_to_string,
    number_to_string,
    params_to_string,
)
from xtrain.metrics.timer import BACKWARD_GLOBAL_TIMER, FORWARD_GLOBAL_TIMER, STEP_GLOBAL_TIMER


class Cost(Protocol):
    """What the calls of one module cost; see `ModuleCost`."""

    flops: int
    seconds: float
    params: int


class Profile(Protocol):
    """What is reported; see `FlopsProfiler`."""

    model: nn.Module
    ds_engine: Any
    recompute_fwd_factor: float

    def cost(self, module: nn.Module) -> Cost:
        """What a module cost."""


_NOTES = """Counted are matrix products, convolutions and attention, not operations element by element.
params: parameters, MACs: multiply-accumulate operations, flops: floating-point operations,
FLOPS: flops per second, fwd/bwd/step latency: of one forward pass, one backward pass, one update"""


def _rate(flops: float, seconds: float) -> str:
    return flops_to_string(flops / seconds) if seconds > 0 else "-"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0:.2f}%"


def _step_lines(profiler: Profile, engine: Any, flops: int) -> list[tuple[str, str]]:
    """What a whole step of the engine costs; latencies of backward and update need wall_clock_breakdown."""
    timers, accumulation = engine.timers, engine.gradient_accumulation_steps()
    forward = timers(FORWARD_GLOBAL_TIMER).mean() / 1000
    backward = timers(BACKWARD_GLOBAL_TIMER).mean() / 1000
    update = timers(STEP_GLOBAL_TIMER).elapsed(reset=False) / 1000
    step = accumulation * (forward + backward) + update
    factor = 2 + profiler.recompute_fwd_factor
    return [
        ("fwd latency", duration_to_string(forward)),
        ("fwd FLOPS per GPU = fwd flops / fwd latency", _rate(flops, forward)),
        ("bwd latency", duration_to_string(backward)),
        (f"bwd FLOPS per GPU = {factor:g} * fwd flops / bwd latency", _rate(factor * flops, backward)),
        (
            f"fwd+bwd FLOPS per GPU = {factor + 1:g} * fwd flops / (fwd+bwd latency)",
            _rate((factor + 1) * flops, forward + backward),
        ),
        ("step latency", duration_to_string(update)),
        ("iter latency = accumulation steps * (fwd + bwd) + step", duration_to_string(step)),
        (
            f"FLOPS per GPU = accumulation steps * {factor + 1:g} * fwd flops / iter latency",
            _rate(accumulation * (factor + 1) * flops, step),
        ),
        ("samples/second", f"{engine.train_batch_size() / step:.2f}" if step > 0 else "-"),
    ]


def summary(profiler: Profile, profile_step: int) -> str:
    """The model as a whole."""
    engine, total = profiler.ds_engine, profiler.cost(profiler.model)
    lines = []
    if engine is not None:
        lines += [
            ("world size", str(engine.world_size)),
            ("data parallel size", str(engine.dp_world_size)),
            ("model parallel size", str(engine.mp_world_size)),
            ("batch size per GPU", str(engine.train_micro_batch_size_per_gpu())),
            ("accumulation steps", str(engine.gradient_accumulation_steps())),
        ]
    lines += [
        ("params", params_to_string(total.params)),
        ("fwd MACs per GPU", macs_to_string(total.flops // 2)),
        ("fwd flops per GPU", number_to_string(total.flops)),
    ]
    if engine is not None and engine.wall_clock_breakdown():
        lines += _step_lines(profiler, engine, total.flops)
    else:
        lines += [
            ("fwd latency", duration_to_string(total.seconds)),
            ("fwd FLOPS per GPU = fwd flops / fwd latency", _rate(total.flops, total.seconds)),
        ]
    table = "\n".join(f"{name + ': ':<70}{value}" for name, value in lines)
    return f"{' Flops profiler ':-^78}\nProfile of step {profile_step}\n{_NOTES}\n\n{table}"


def _by_depth(model: nn.Module) -> list[list[nn.Module]]:
    """The modules of each depth; one that stands in several places is there once for each."""
    levels, level = [], [model]
    while level:
        levels.append(level)
        level = [child for module in level for child in module.children()]
    return levels


def aggregated(profiler: Profile, module_depth: int, top_modules: int) -> str:
    """The classes with the largest sums, at each depth down to `module_depth`."""
    levels = _by_depth(profiler.model)
    last = len(levels) - 1 if module_depth == -1 else min(module_depth, len(levels) - 1)
    lines = [
        f"{' Aggregated profile per GPU ':-^78}",
        f"Top {top_modules} classes of modules by params, MACs and fwd latency at each depth",
    ]
    for depth, level in enumerate(levels[: last + 1]):
        sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
        for module in level:
            cost = profiler.cost(module)
            for index, value in enumerate((cost.params, cost.flops // 2, cost.seconds)):
                sums[type(module).__name__][index] += value
        lines.append(f"depth {depth}:")
        for index, (title, text) in enumerate(
            (("params", params_to_string), ("MACs", macs_to_string), ("fwd latency", duration_to_string))
        ):
            largest = sorted(sums.items(), key=lambda item: -item[1][index])[:top_modules]
            shown = ", ".join(f"{name}: {text(values[index])}" for name, values in largest)
            lines.append(f"    {title:<12}- {shown}")
    return "\n".join(lines)


def modules(profiler: Profile) -> str:
    """Every module, indented by depth."""
    total = profiler.cost(profiler.model)
    lines = [
        f"{' Detailed profile per GPU ':-^78}",
        "(name) class: params, MACs and fwd latency, each with its part of the whole; fwd FLOPS",
    ]

    def walk(module: nn.Module, name: str, depth: int) -> None:
        cost = profiler.cost(module)
        lines.append(
            f"{'  ' * depth}{f'({name}) ' if name else ''}{type(module).__name__}: "
            f"{params_to_string(cost.params)} = {_percent(cost.params, total.params)} params, "
            f"{macs_to_string(cost.flops // 2)} = {_percent(cost.flops, total.flops)} MACs, "
            f"{duration_to_string(cost.seconds)} = {_percent(cost.seconds, total.seconds)} latency, "
            f"{_rate(cost.flops, cost.seconds)}"
        )
        for child_name, child in module.named_children():
            walk(child, child_name, depth + 1)

    walk(profiler.model, "", 0)
    return "\n".join(lines)
