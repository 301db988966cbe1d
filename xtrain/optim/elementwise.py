"""What xtrain's own optimizers share: an update of flat tensors in cache-sized chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, TypeGuard

import torch


class ElementwiseOptimizer(torch.optim.Optimizer):
    """An optimizer that updates every element on its own, in plain tensor operations.

    A subclass names its states and writes the arithmetic of one step; order and operations are then the
    same on every backend.
    """

    state_names: tuple[str, ...] = ()
    """States with one value an element, zero at the start."""

    chunk_size: int | None = None
    """Elements to update at a time (None: all), so that the passes of one update find them in cache.
    The arithmetic of an element does not depend on it."""

    @staticmethod
    @abstractmethod
    def arithmetic(
        param: torch.Tensor, grad: torch.Tensor, states: list[torch.Tensor], step: int, group: dict[str, Any]
    ) -> None:
        """Update `param` and `states` in place; all have one shape. `step` counts from 1."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group)
        return loss

    @torch.no_grad()
    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """One update of one parameter of `group`, which has a gradient."""
        grad = param.grad
        assert grad is not None
        state = self.state[param]
        if not state:
            state["step"] = 0
            for name in self.state_names:
                state[name] = torch.zeros_like(param)
        state["step"] += 1
        states = [state[name] for name in self.state_names]
        size = self.chunk_size
        together = [param, grad, *states]
        if size is None or size >= param.numel() or not all(tensor.is_contiguous() for tensor in together):
            self.arithmetic(param, grad, states, state["step"], group)
            return
        for chunk in zip(*(tensor.view(-1).split(size) for tensor in together), strict=True):
            self.arithmetic(chunk[0], chunk[1], list(chunk[2:]), state["step"], group)


def updates_one_by_one(optimizer: torch.optim.Optimizer) -> TypeGuard[ElementwiseOptimizer]:
    """Whether `update` of every parameter is the same as `step`: then one gradient at a time need exist in
    the dtype of the update."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(
        optimizer, "_optimizer_step_post_hooks", None
    )
    own_step = type(optimizer).step is ElementwiseOptimizer.step
    return isinstance(optimizer, ElementwiseOptimizer) and own_step and not hooks
