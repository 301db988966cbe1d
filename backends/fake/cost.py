"""A modelled clock: how long operators and messages would take on another chip. It computes nothing else.

An operator takes as long as its arithmetic or its traffic with memory, whichever is longer; a message its bytes over
the link and a latency. Nothing overlaps, and peak rates are reached: operators are bounded from below, communication
that would hide behind them from above.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from xtrain.backends.fake.profiles import Costs

_NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _tensors(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


class Clock:
    """Seconds that the chip would have needed since the last `take`.

    Attributes:
        compute, links: seconds in operators and in messages.
        operators, messages: how many there were.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.compute = self.links = 0.0
        self.operators = self.messages = 0

    def _rate(self, dtype: torch.dtype) -> float:
        """Operations per second in a dtype; of the nearest format where the chip's own is not given."""
        flops = self.costs.flops
        name = _NAMES.get(dtype, "fp32")
        order = {"fp32": ("tf32", "fp32", "fp16"), "fp64": ("fp64", "fp32", "fp16")}.get(
            name, (name, "fp16", "bf16", "fp32")
        )
        return next((flops[one] for one in order if one in flops), max(flops.values()))

    def operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Count one operator; views take no time."""
        if func.namespace != "aten" or func.is_view:
            return
        inputs = _tensors([*args, *kwargs.values()])
        outputs = _tensors([result])
        moved = sum(tensor.nbytes for tensor in (*inputs, *outputs))
        seconds = moved / self.costs.memory
        if (formula := flop_registry.get(func._overloadpacket)) is not None and inputs:
            seconds = max(seconds, formula(*args, **kwargs, out_val=result) / self._rate(inputs[0].dtype))
        self.compute += seconds
        self.operators += 1
        self._pass(seconds)

    def message(self, sent_bytes: float) -> None:
        """Count one collective or message of which this rank sends so many bytes."""
        seconds = self.costs.latency + sent_bytes / self.costs.link
        self.links += seconds
        self.messages += 1
        self._pass(seconds)

    def _pass(self, seconds: float) -> None:
        if self.costs.sleep:
            time.sleep(seconds)

    def take(self) -> dict[str, float | int]:
        """What was counted since the last call, for a line of the record."""
        counted: dict[str, float | int] = {
            "compute": self.compute,
            "links": self.links,
            "operators": self.operators,
            "messages": self.messages,
        }
        self.compute = self.links = 0.0
        self.operators = self.messages = 0
        return counted
