"""DeepSpeed's memory-efficient linear layer, for scripts that call it by name.

The engine needs none: in stage 3 what any layer saves of a parameter for backward is freed and gathered again with
it. This one saves the parameter itself, whatever its dtype under autocast is, and knows `torch.func`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from xtrain.zero.home import whole


class LinearFunctionForZeroStage3(torch.autograd.Function):
    """y = x Wᵀ + b, whose backward runs under the autocast state of its forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(..., in) and (out, in) to (..., out)."""
        return F.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Save the inputs, and what autocast is."""
        input, weight, bias = (*inputs, None)[:3]
        ctx._device_type = weight.device.type
        ctx._fwd_used_autocast = torch.is_autocast_enabled(ctx._device_type)
        ctx._dtype = torch.get_autocast_dtype(ctx._device_type)
        ctx.save_for_backward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of input, weight and bias, where they are needed."""
        input, weight, bias = ctx.saved_tensors
        of_input = of_weight = of_bias = None
        with torch.autocast(ctx._device_type, enabled=ctx._fwd_used_autocast, dtype=ctx._dtype):
            rows = grad_output.reshape(-1, grad_output.shape[-1])
            if ctx.needs_input_grad[0]:
                if isinstance(weight, nn.Parameter) and not weight.numel():
                    with whole(weight) as data:  # divided: backward has come here without its module
                        of_input = grad_output.matmul(data)
                else:
                    of_input = grad_output.matmul(weight)
            if ctx.needs_input_grad[1]:
                of_weight = rows.t().matmul(input.reshape(-1, input.shape[-1]))
            if bias is not None and ctx.needs_input_grad[2]:
                of_bias = rows.sum(0)
        return of_input, of_weight, of_bias


def zero3_linear_wrap(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` by `LinearFunctionForZeroStage3`."""
    result: torch.Tensor = LinearFunctionForZeroStage3.apply(input, weight, bias)
    return result


class LinearModuleForZeroStage3(nn.Linear):
    """`torch.nn.Linear` by `LinearFunctionForZeroStage3`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        return zero3_linear_wrap(input, self.weight, self.bias)
