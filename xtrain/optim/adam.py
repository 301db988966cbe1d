"""Adam and AdamW in plain tensor operations: the same operations, in the same order, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Adam(torch.optim.Optimizer):
    """Adam (Kingma and Ba, 2015), or AdamW (Loshchilov and Hutter, 2019) with `adam_w_mode`.

    Arguments and defaults are those of DeepSpeed's FusedAdam. Moments have the parameters' dtype
    (float32 on master slices); the bias corrections are computed in double precision on the host.

    Args:
        params: tensors, or dictionaries of options with a `params` key.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment, after bias correction.
        weight_decay: decoupled from the gradient with `adam_w_mode`, else added to it (L2).
        bias_correction: divide the moments by 1 - beta^t.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(f"lr ({lr}), eps ({eps}) and weight_decay ({weight_decay}) must not be negative")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {tuple(betas)}")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
        }
        super().__init__(params, defaults)
        self.chunk_size: int | None = None
        """Elements to update at a time (None: all), so that the passes of one update find them in cache.
        The arithmetic of an element does not depend on it."""

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
                    self._update(param, param.grad, group)
        return loss

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Update one parameter, in chunks where it is flat."""
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        state["step"] += 1
        size = param.numel() if self.chunk_size is None or param.ndim != 1 else self.chunk_size
        moments = state["exp_avg"], state["exp_avg_sq"]
        if size >= param.numel():
            self._arithmetic(param, grad, *moments, state["step"], group)
            return
        for start in range(0, param.numel(), size):
            p, g, m, v = (tensor[start : start + size] for tensor in (param, grad, *moments))
            self._arithmetic(p, g, m, v, state["step"], group)

    @staticmethod
    def _arithmetic(
        param: torch.Tensor,
        grad: torch.Tensor,
        exp_avg: torch.Tensor,
        exp_avg_sq: torch.Tensor,
        step: int,
        group: dict[str, Any],
    ) -> None:
        """The update itself; all tensors have one shape and are changed in place, `grad` excepted."""
        beta1, beta2 = group["betas"]
        lr, decay = group["lr"], group["weight_decay"]
        if decay and group["adam_w_mode"]:
            param.mul_(1.0 - lr * decay)
        elif decay:
            grad = grad.add(param, alpha=decay)
        exp_avg.lerp_(grad, 1.0 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            correction1 = 1.0 - beta1**step
            correction2 = 1.0 - beta2**step
        denominator = exp_avg_sq.sqrt().div_(math.sqrt(correction2)).add_(group["eps"])
        param.addcdiv_(exp_avg, denominator, value=-lr / correction1)
