"""Lamb in plain tensor operations, over parameters or over slices of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from xtrain import comm
from xtrain.optim.chunked import check_options
from xtrain.optim.parameterwise import ParameterwiseOptimizer


class Lamb(ParameterwiseOptimizer):
    """LAMB (You et al., 2020) as DeepSpeed's FusedLamb computes it; its arguments and defaults.

    Adam's direction plus the decayed weight is `u`; the weight w moves by
    `lr * sqrt(1 - beta2^t) / (1 - beta1^t) * clamp(|w| / |u|, min_coeff, max_coeff) * u`. The norms are
    of the whole parameter; the coefficient is 1 where one of them is zero. Their squares are added up in the
    backend's dtype for long sums, over all ranks in one all-reduce of two numbers a parameter, and rounded
    to float32, so that the coefficient does not depend on how parameters are cut.

    Args:
        params: tensors, or dictionaries of options with a `params` key.
        lr: learning rate.
        bias_correction: apply the two roots of the formula above.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment, or to the second moment with `eps_inside_sqrt`.
        weight_decay: times the weight, added to Adam's direction.
        max_coeff, min_coeff: bounds of the coefficient |w| / |u|.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
    ) -> None:
        check_options(betas, lr=lr, eps=eps, weight_decay=weight_decay)
        if not 0.0 <= min_coeff <= max_coeff:
            raise ValueError(f"min_coeff ({min_coeff}) must be between 0 and max_coeff ({max_coeff})")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "eps_inside_sqrt": eps_inside_sqrt,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
        }
        super().__init__(params, defaults)
        self._coefficients: dict[torch.Tensor, float] = {}

    def get_lamb_coeffs(self) -> list[float]:
        """The coefficient of each parameter in the last step, in the order in which they were given."""
        return [self._coefficients[param] for param in self.given if param in self._coefficients]

    def update(self) -> None:
        """Moments and sums of squares; their sum over ranks; the update."""
        held = [(group, item) for group, items in self.param_fragments() for item in items]
        if not held:
            return
        device = held[0][1].tensor.device
        sums = torch.zeros(2, len(held), dtype=self.precision.norm_dtype, device=device)
        tensors = dict.fromkeys(item.tensor for _, item in held)
        states = {tensor: self.count_step(tensor, self.state_names) for tensor in tensors}
        parts = []
        for index, (group, item) in enumerate(held):
            state, grad = states[item.tensor], item.tensor.grad
            assert grad is not None
            wholes = (item.tensor, grad, state["exp_avg"], state["exp_avg_sq"])
            parts.append(tuple(item.part(whole) for whole in wholes))
            if item.own.length:
                self._moments(parts[-1], group, sums[:, index])
        if self.ranks > 1:
            sums = sums.to(held[0][1].parameter.device)  # masters may be offloaded
            comm.all_reduce(sums, group=self.process_group)
        weights, directions = sums.sqrt().float().tolist()
        for index, (group, item) in enumerate(held):
            coefficient = _coefficient(weights[index], directions[index], group)
            self._coefficients[item.parameter] = coefficient
            rate = coefficient * _step_size(group, states[item.tensor]["step"])
            param, _, exp_avg, exp_avg_sq = parts[index]
            for p, m, v in self.chunks(param, exp_avg, exp_avg_sq):
                p.add_(_direction(p, m, v, group), alpha=-rate)

    def _moments(self, tensors: tuple[torch.Tensor, ...], group: dict[str, Any], sums: torch.Tensor) -> None:
        """Advance the moments of one run; add the squares of its weights and of their direction to `sums`."""
        beta1, beta2 = group["betas"]
        for param, grad, exp_avg, exp_avg_sq in self.chunks(*tensors):
            exp_avg.lerp_(grad, 1.0 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            direction = _direction(param, exp_avg, exp_avg_sq, group)
            sums[0] += param.to(sums.dtype).square().sum()
            sums[1] += direction.to(sums.dtype).square().sum()


def _direction(
    param: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, group: dict[str, Any]
) -> torch.Tensor:
    """Adam's direction without bias correction, plus the decayed weight; a new tensor."""
    eps = group["eps"]
    root = (exp_avg_sq + eps).sqrt_() if group["eps_inside_sqrt"] else exp_avg_sq.sqrt().add_(eps)
    direction = torch.div(exp_avg, root, out=root)
    return direction.add_(param, alpha=group["weight_decay"]) if group["weight_decay"] else direction


def _coefficient(weight: float, direction: float, group: dict[str, Any]) -> float:
    if weight == 0.0 or direction == 0.0:
        return 1.0
    return min(max(weight / direction, group["min_coeff"]), group["max_coeff"])


def _step_size(group: dict[str, Any], step: int) -> float:
    if not group["bias_correction"]:
        return float(group["lr"])
    beta1, beta2 = group["betas"]
    return float(group["lr"] * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step))
