"""What xtrain's own optimizers share: states made at the first step, and updates in cache-sized chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from xtrain.base.errors import ConfigError, NotImplementedYetError


class ChunkedOptimizer(torch.optim.Optimizer):
    """An optimizer in plain tensor operations, the same in the same order on every backend."""

    state_names: tuple[str, ...] = ()
    """States with one value an element, zero at the start."""

    chunk_size: int | None = None
    """Elements to update at a time (None: all), so that the passes of one update find them in cache.
    The arithmetic of an element does not depend on it."""

    def count_step(self, tensor: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """The tensor's state, made at the first step, with its step count raised by one."""
        state = self.state[tensor]
        if not state:
            state["step"] = 0
            for name in names:
                state[name] = torch.zeros_like(tensor)
        state["step"] += 1
        return state

    def chunks(self, *parts: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Tensors of one shape, `chunk_size` elements at a time."""
        size, total = self.chunk_size, parts[0].numel()
        if size is None or size >= total or not all(part.is_contiguous() for part in parts):
            yield parts
            return
        yield from zip(*(part.view(-1).split(size) for part in parts), strict=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update_all()
        return loss

    @abstractmethod
    def update_all(self) -> None:
        """Update every parameter from `grad` of its tensor."""


def check_options(betas: Sequence[float] = (0.0, 0.0), **not_negative: float) -> None:
    """Refuse options of an optimizer that are out of range.

    Raises:
        ConfigError: a value of `not_negative` is, or one of `betas` is not in [0, 1).
    """
    if any(value < 0 for value in not_negative.values()):
        *others, last = (f"{name} ({value})" for name, value in not_negative.items())
        raise ConfigError(f"{', '.join(others)} and {last} must not be negative")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"betas must be two numbers in [0, 1), got {tuple(betas)}")


def refuse_options(amsgrad: bool = False, fp32_optimizer_states: bool = True) -> None:
    """Refuse what DeepSpeed's optimizers can and xtrain's cannot.

    Raises:
        NotImplementedYetError: `amsgrad`, or states in another dtype than float32.
    """
    if not fp32_optimizer_states:
        raise NotImplementedYetError("fp32_optimizer_states=False", "leave it out: states are float32")
    if amsgrad:
        raise NotImplementedYetError("amsgrad", "use torch.optim.AdamW(amsgrad=True)")
