"""`apex.optimizers.FusedAdagrad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xtrain.shims.apex import amp_C
from xtrain.shims.apex.multi_tensor_apply import multi_tensor_applier
from xtrain.shims.apex.optimizers.fused import FusedOptimizer, loss_of


class FusedAdagrad(FusedOptimizer):
    """Adagrad; with `adagrad_w_mode` the decay is added to the update, else to the gradient.

    Args:
        params: parameters (float16 or float32) or groups of them.
    """

    xtrain_elementwise = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        adagrad_w_mode: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, set_grad_none)
        self.adagrad_w_mode = int(adagrad_w_mode)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns the closure's loss."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for lists in self._by_dtype(group["params"], lambda param: self._zeros(param, "sum")):
                multi_tensor_applier(
                    amp_C.multi_tensor_adagrad, self._dummy_overflow_buf, lists, group["lr"], group["eps"],
                    self.adagrad_w_mode, group["weight_decay"],
                )  # fmt: skip
        return loss
