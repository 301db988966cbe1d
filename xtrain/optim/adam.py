"""Adam and AdamW in plain tensor operations: the same operations, in the same order, on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from xtrain.optim.chunked import check_options
from xtrain.optim.elementwise import ElementwiseOptimizer


class Adam(ElementwiseOptimizer):
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

    state_names = ("exp_avg", "exp_avg_sq")

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
        check_options(betas, lr=lr, eps=eps, weight_decay=weight_decay)
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adam_w_mode": adam_w_mode,
        }
        super().__init__(params, defaults)

    @staticmethod
    def arithmetic(
        param: torch.Tensor, grad: torch.Tensor, states: list[torch.Tensor], step: int, group: dict[str, Any]
    ) -> None:
        """Decay, moments, update."""
        exp_avg, exp_avg_sq = states
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
