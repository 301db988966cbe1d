"""`apex.optimizers.FusedNovoGrad`: one second moment for each tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtrain.shims.apex import amp_C
from xtrain.shims.apex.multi_tensor_apply import multi_tensor_applier
from xtrain.shims.apex.optimizers.fused import NARROW, FusedOptimizer, loss_of


class FusedNovoGrad(FusedOptimizer):
    """NovoGrad (https://arxiv.org/abs/1905.11286).

    Args:
        params: parameters (float16 or float32) or groups of them.
        reg_inside_moment: gradients are normalised and decayed before the momentum.
        grad_averaging: the gradient counts 1 - beta1 in the first moment, else 1.
        norm_type: 2, or 0 for the largest magnitude.
        init_zero: the second moment starts at 0, else at the first gradient's norm.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        reg_inside_moment: bool = False,
        grad_averaging: bool = True,
        norm_type: int = 2,
        init_zero: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedNovoGrad does not support the AMSGrad variant.")
        if norm_type not in (0, 2):
            raise RuntimeError("FusedNovoGrad only support l2/inf norm now.")
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "grad_averaging": grad_averaging, "norm_type": norm_type, "init_zero": init_zero,
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none)
        self.moment_mode = 0 if reg_inside_moment else 1

    def _first_norms(self, group: dict[str, Any], grads: list[torch.Tensor]) -> torch.Tensor:
        device = self._dummy_overflow_buf.device
        if group["init_zero"] or not grads:
            return torch.zeros(len(grads), device=device)
        kind = float("inf") if group["norm_type"] == 0 else 2
        return torch.stack([torch.linalg.vector_norm(grad.float(), kind) for grad in grads]).to(device)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns the closure's loss.

        Raises:
            RuntimeError: other parameters have gradients than in the first step.
        """
        loss = loss_of(closure)
        for group in self.param_groups:
            number = self._count(group)
            found = list(self._by_dtype(group["params"], lambda param: self._zeros(param, "exp_avg")))
            by_dtype = {lists[1][0].dtype: lists for lists in found}
            grads = [by_dtype[dtype][0] if dtype in by_dtype else [] for dtype in NARROW]
            if "exp_avg_sq" not in group:
                group["exp_avg_sq"] = [self._first_norms(group, given) for given in grads]
            for place, dtype in enumerate(NARROW):
                norms = group["exp_avg_sq"][place]
                if len(grads[place]) != norms.numel():
                    raise RuntimeError("FusedNovoGrad needs gradients of the same parameters in every step")
                if dtype in by_dtype:
                    multi_tensor_applier(
                        amp_C.multi_tensor_novograd, self._dummy_overflow_buf, by_dtype[dtype], norms, group["lr"],
                        *group["betas"], group["eps"], number, int(group["bias_correction"]), group["weight_decay"],
                        int(group["grad_averaging"]), self.moment_mode, group["norm_type"],
                    )  # fmt: skip
        return loss
