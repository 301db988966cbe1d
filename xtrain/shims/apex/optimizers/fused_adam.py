"""`apex.optimizers.FusedAdam`: Adam, by default with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtrain.shims.apex import amp_C
from xtrain.shims.apex.multi_tensor_apply import multi_tensor_applier
from xtrain.shims.apex.optimizers.fused import NARROW, FusedOptimizer, loss_of


class FusedAdam(FusedOptimizer):
    """AdamW, or Adam with `adam_w_mode=False`; moments are float32 whatever the parameters are.

    Args:
        params: parameters (float16, bfloat16 or float32) or groups of them.
        adam_w_mode: the decay is added to the update, else to the gradient.
        set_grad_none: whether `zero_grad` removes gradients.
        capturable: `lr` and the step count are tensors, and gradients that a GradScaler found infinite skip the step.
        master_weights: float32 copies of the parameters, which are updated instead; only with `capturable`.

    Raises:
        RuntimeError: amsgrad, or master weights without `capturable`.
    """

    dtypes = (*NARROW, torch.bfloat16)
    xtrain_elementwise = True  # for check_elementwise: ZeRO may give it slices

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        if master_weights and not capturable:
            raise RuntimeError("Master weights is currently only supported with the capturable version.")
        rate = torch.tensor(lr, dtype=torch.float32) if capturable else lr
        defaults = {
            "lr": rate, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none)
        self.adam_w_mode = int(adam_w_mode)
        self.capturable = capturable
        self.master_weights = master_weights
        self._masters: dict[torch.Tensor, torch.Tensor] = {}
        if capturable:
            self._step_supports_amp_scaling = True  # GradScaler.step hands itself over
            for group in self.param_groups:
                if group["params"]:
                    group["lr"] = group["lr"].to(group["params"][0].device)
        if master_weights:
            for group in self.param_groups:
                self._masters.update({p: p.detach().clone().float() for p in group["params"]})

    def _states(self, param: torch.Tensor) -> list[torch.Tensor]:
        moments = self._zeros(param, "exp_avg", "exp_avg_sq", dtype=torch.float32)
        return [*moments, self._masters[param]] if self.master_weights else moments

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: Any = None,
        output_params: Any = None,
        scale: Any = None,
        grad_norms: Any = None,
        grad_scaler: Any = None,
    ) -> Any:
        """Take a step; returns the closure's loss.

        Raises:
            RuntimeError: one of the arguments that only old versions of apex took.
        """
        if any(given is not None for given in (grads, output_params, scale, grad_norms)):
            raise RuntimeError(
                "FusedAdam takes no gradients, scale or output parameters any more: call step() alone"
            )
        loss = loss_of(closure)
        for group in self.param_groups:
            if not group["params"]:
                continue
            if self.capturable:
                self._capturable(group, grad_scaler)
                continue
            number = self._count(group)
            for lists in self._by_dtype(group["params"], self._states):
                multi_tensor_applier(
                    amp_C.multi_tensor_adam, self._dummy_overflow_buf, lists, group["lr"], *group["betas"],
                    group["eps"], number, self.adam_w_mode, int(group["bias_correction"]), group["weight_decay"],
                )  # fmt: skip
        return loss

    def _capturable(self, group: dict[str, Any], grad_scaler: Any) -> None:
        device = group["params"][0].device
        found = inverse = None
        if grad_scaler is not None:
            found = grad_scaler._check_inf_per_device(self)[device]
            inverse = grad_scaler._get_scale_async().double().reciprocal().float()
        # apex counts by what the step before this one has found; counting by this one is what is meant.
        self._dummy_overflow_buf.copy_(torch.zeros(1) if found is None else found)
        inverse = torch.ones(1, device=device) if inverse is None else inverse
        before = group.get("step", torch.zeros(1, dtype=torch.int32, device=device))
        group["step"] = before + (self._dummy_overflow_buf != 1).to(torch.int32)
        operation = (
            amp_C.multi_tensor_adam_capturable_master
            if self.master_weights
            else amp_C.multi_tensor_adam_capturable
        )
        for lists in self._by_dtype(group["params"], self._states):
            multi_tensor_applier(
                operation, self._dummy_overflow_buf, lists, group["lr"], *group["betas"], group["eps"],
                group["step"], self.adam_w_mode, int(group["bias_correction"]), group["weight_decay"], inverse,
            )  # fmt: skip
