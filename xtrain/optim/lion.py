"""Lion in plain tensor operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from xtrain.optim.chunked import check_options
from xtrain.optim.elementwise import ElementwiseOptimizer


class Lion(ElementwiseOptimizer):
    """Lion (Chen et al., 2023): the sign of an interpolated momentum. Defaults are DeepSpeed's FusedLion's.

    Args:
        params: tensors, or dictionaries of options with a `params` key.
        lr: learning rate.
        betas: weights of the momentum in the update, and of the momentum's own decay.
        weight_decay: decoupled from the gradient.
    """

    state_names = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        check_options(betas, lr=lr, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @staticmethod
    def arithmetic(
        param: torch.Tensor, grad: torch.Tensor, states: list[torch.Tensor], step: int, group: dict[str, Any]
    ) -> None:
        """Decay, signed update, momentum."""
        (exp_avg,) = states
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        if group["weight_decay"]:
            param.mul_(1.0 - lr * group["weight_decay"])
        param.add_(exp_avg.lerp(grad, 1.0 - beta1).sign_(), alpha=-lr)
        exp_avg.lerp_(grad, 1.0 - beta2)
