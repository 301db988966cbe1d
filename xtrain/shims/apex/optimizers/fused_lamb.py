"""`apex.optimizers.FusedLAMB`: LAMB, with the global gradient norm clipped first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtrain.shims.apex import amp_C
from xtrain.shims.apex.multi_tensor_apply import multi_tensor_applier
from xtrain.shims.apex.optimizers.fused import FusedOptimizer, loss_of


class FusedLAMB(FusedOptimizer):
    """LAMB (https://arxiv.org/abs/1904.00962). After a step the gradients hold the updates, as in apex.

    Args:
        params: parameters (float16 or float32) or groups of them.
        grad_averaging: the gradient counts 1 - beta1 in the first moment, else 1.
        max_grad_norm: of all gradients together; of the first group's setting, as in apex.
        use_nvlamb: the ratio of norms counts without a decay, too.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedLAMB does not support the AMSGrad variant.")
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none)
        self.adam_w_mode = int(adam_w_mode)
        self.use_nvlamb = use_nvlamb

    def _global_norm(self) -> torch.Tensor:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return torch.zeros(1, device=self._dummy_overflow_buf.device)
        norm: torch.Tensor = multi_tensor_applier(
            amp_C.multi_tensor_l2norm, self._dummy_overflow_buf, [grads], False
        )[0]
        return norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns the closure's loss."""
        loss = loss_of(closure)
        norm = self._global_norm()
        for group in self.param_groups:
            number = self._count(group)
            for lists in self._by_dtype(
                group["params"], lambda param: self._zeros(param, "exp_avg", "exp_avg_sq")
            ):
                multi_tensor_applier(
                    amp_C.multi_tensor_lamb, self._dummy_overflow_buf, lists, group["lr"], *group["betas"],
                    group["eps"], number, int(group["bias_correction"]), group["weight_decay"],
                    int(group["grad_averaging"]), self.adam_w_mode, norm, self.defaults["max_grad_norm"],
                    self.use_nvlamb,
                )  # fmt: skip
        return loss
