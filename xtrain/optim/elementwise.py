"""Optimizers that update every element on its own."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, TypeGuard

import torch

from xtrain.optim.chunked import ChunkedOptimizer


class ElementwiseOptimizer(ChunkedOptimizer):
    """A subclass names its states and writes the arithmetic of one step."""

    @staticmethod
    @abstractmethod
    def arithmetic(
        param: torch.Tensor, grad: torch.Tensor, states: list[torch.Tensor], step: int, group: dict[str, Any]
    ) -> None:
        """Update `param` and `states` in place; all have one shape. `step` counts from 1."""

    def update_all(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group)

    @torch.no_grad()
    def update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        """One update of one parameter of `group`, which has a gradient."""
        assert param.grad is not None
        state = self.count_step(param, self.state_names)
        states = (state[name] for name in self.state_names)
        for weight, grad, *parts in self.chunks(param, param.grad, *states):
            self.arithmetic(weight, grad, parts, state["step"], group)


def updates_one_by_one(optimizer: torch.optim.Optimizer) -> TypeGuard[ElementwiseOptimizer]:
    """Whether `update` of every parameter is the same as `step`: then one gradient at a time need exist in
    the dtype of the update."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None) or getattr(
        optimizer, "_optimizer_step_post_hooks", None
    )
    # torch wraps the `step` of each class when it makes the first instance.
    own_step = inspect.unwrap(type(optimizer).step) is inspect.unwrap(ElementwiseOptimizer.step)
    return isinstance(optimizer, ElementwiseOptimizer) and own_step and not hooks
