"""Adagrad in plain tensor operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from xtrain.optim.chunked import check_options
from xtrain.optim.elementwise import ElementwiseOptimizer


class Adagrad(ElementwiseOptimizer):
    """Adagrad (Duchi et al., 2011): the gradient over the root of the sum of its squares, as in DeepSpeedCPUAdagrad.

    Args:
        params: tensors, or dictionaries of options with a `params` key.
        lr: learning rate.
        eps: added to the root.
        weight_decay: times the weight, added to the gradient.
    """

    state_names = ("exp_avg_sq",)

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, eps: float = 1e-10, weight_decay: float = 0.0
    ) -> None:
        check_options(lr=lr, eps=eps, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @staticmethod
    def arithmetic(
        param: torch.Tensor, grad: torch.Tensor, states: list[torch.Tensor], step: int, group: dict[str, Any]
    ) -> None:
        """Decay, sum of squares, update."""
        (total,) = states
        if group["weight_decay"]:
            grad = grad.add(param, alpha=group["weight_decay"])
        total.addcmul_(grad, grad)
        param.addcdiv_(grad, total.sqrt().add_(group["eps"]), value=-group["lr"])
