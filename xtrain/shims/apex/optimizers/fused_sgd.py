"""`apex.optimizers.FusedSGD`: SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtrain.shims.apex import amp_C
from xtrain.shims.apex.multi_tensor_apply import multi_tensor_applier
from xtrain.shims.apex.optimizers.fused import FusedOptimizer, loss_of


class FusedSGD(FusedOptimizer):
    """SGD as torch.optim.SGD has it.

    Args:
        params: parameters (float16 or float32) or groups of them.
        lr: must be given.
        wd_after_momentum: the decay is added after the momentum.
        materialize_master_grads: whether unscaled float32 gradients are kept under apex.amp: always done here.

    Raises:
        ValueError: a value out of range; Nesterov's momentum without a momentum, or with a dampening.
    """

    xtrain_elementwise = True

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        if lr is None:
            raise ValueError("FusedSGD needs a learning rate: lr=...")
        for name, value in (("learning rate", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if value < 0.0:
                raise ValueError(f"Invalid {name} value: {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none)
        self.wd_after_momentum = wd_after_momentum
        self.materialize_master_grads = materialize_master_grads

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; returns the closure's loss."""
        loss = loss_of(closure)
        for group in self.param_groups:
            # Apart: of a parameter that has its first gradient later, the momentum begins then.
            fresh = [p for p in group["params"] if "momentum_buffer" not in self.state[p]]
            moving = [p for p in group["params"] if "momentum_buffer" in self.state[p]]
            for params, first_run in ((fresh, True), (moving, False)):
                for lists in self._by_dtype(params, self._momentum):
                    multi_tensor_applier(
                        amp_C.multi_tensor_sgd, self._dummy_overflow_buf, lists, group["weight_decay"],
                        group["momentum"], group["dampening"], group["lr"], group["nesterov"], first_run,
                        self.wd_after_momentum, 1.0,
                    )  # fmt: skip
        return loss

    def _momentum(self, param: torch.Tensor) -> list[torch.Tensor]:
        return self._zeros(param, "momentum_buffer")
