"""What apex's optimizers share: `zero_grad`, one step count per group, and lists of tensors by dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

NARROW = (torch.float16, torch.float32)


class FusedOptimizer(torch.optim.Optimizer):
    """Base of apex's optimizers.

    Attributes:
        set_grad_none: whether `zero_grad` removes gradients; else it sets them to 0.
        dtypes: of parameters, that are updated; others are an error, as in apex.
    """

    dtypes: tuple[torch.dtype, ...] = NARROW
    set_grad_none: bool

    def __init__(self, params: Any, defaults: dict[str, Any], set_grad_none: bool) -> None:
        super().__init__(params, defaults)
        self.set_grad_none = set_grad_none
        first = next((p for group in self.param_groups for p in group["params"]), None)
        device = None if first is None else first.device
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int32, device=device)

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Remove gradients, or set them to 0; without an argument as `set_grad_none` says."""
        super().zero_grad(set_to_none=self.set_grad_none if set_to_none is None else set_to_none)

    def _count(self, group: dict[str, Any]) -> int:
        """The number of the group's step, from 1."""
        group["step"] = group.get("step", 0) + 1
        return int(group["step"])

    def _by_dtype(
        self, params: Iterable[torch.Tensor], states: Callable[[torch.Tensor], list[torch.Tensor]]
    ) -> Iterator[list[list[torch.Tensor]]]:
        """For each dtype that has gradients: [gradients, parameters, first states, ...].

        Raises:
            RuntimeError: a sparse gradient, or a dtype that apex does not take.
        """
        name = type(self).__name__
        lists: dict[torch.dtype, list[list[torch.Tensor]]] = {dtype: [] for dtype in self.dtypes}
        for param in params:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(
                    f"{name} does not support sparse gradients, please consider SparseAdam instead"
                )
            if param.dtype not in lists:
                raise RuntimeError(f"{name} takes {', '.join(map(str, self.dtypes))}, not {param.dtype}")
            lists[param.dtype].append([param.grad, param, *states(param)])
        for rows in lists.values():
            if rows:
                yield [list(column) for column in zip(*rows, strict=True)]

    def _zeros(
        self, param: torch.Tensor, *names: str, dtype: torch.dtype | None = None
    ) -> list[torch.Tensor]:
        """States of a parameter, zeros in its shape at first."""
        state = self.state[param]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=dtype, requires_grad=False)
        return [state[name] for name in names]


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure returns, computed with gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
