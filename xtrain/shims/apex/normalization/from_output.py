"""Norms that keep their output for the backward pass: the normalised input is (output - bias) / weight."""

from __future__ import annotations

from typing import Any

import torch

from xtrain.shims.apex.kernels.lists import wide


def _over(tensor: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """The sum over dimensions; over none of them where there are none, which torch takes for all."""
    return tensor.sum(dims) if dims else tensor


class NormFromOutput(torch.autograd.Function):
    """Layer norm or RMS norm, whose input need not be kept.

    A weight that is nearer to 0 than `eps` is taken for `eps` when it divides, as in apex: there the gradient of the
    input is an approximation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        shape: tuple[int, ...],
        eps: float,
        rms: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The norm over the last dimensions, of size `shape`, in `dtype`."""
        dims = tuple(range(-len(shape), 0))
        whole = wide(input)
        if not rms:
            whole = whole - whole.mean(dims, keepdim=True)
        inverse = torch.rsqrt(whole.square().mean(dims, keepdim=True) + eps)
        result = whole * inverse
        if weight is not None:
            result = result * wide(weight)
        if bias is not None:
            result = result + wide(bias)
        output = result.to(dtype)
        ctx.save_for_backward(output, weight, bias, inverse)
        ctx.dims, ctx.eps, ctx.rms, ctx.dtype = dims, eps, rms, input.dtype
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of input, weight and bias."""
        output, weight, bias, inverse = ctx.saved_tensors
        given, normal = wide(grads[0]), wide(output)
        lead = tuple(range(given.dim() - len(ctx.dims)))
        grad_bias = grad_weight = None
        if bias is not None:
            grad_bias = _over(given, lead).to(bias.dtype)
            normal = normal - wide(bias)
        inner = given
        if weight is not None:
            scale = wide(weight)
            far = torch.where(scale < 0, -1.0, 1.0) * scale.abs().clamp_min(ctx.eps)
            normal = normal / far
            grad_weight = _over(given * normal, lead).to(weight.dtype)
            inner = given * scale
        along = normal * (inner * normal).mean(ctx.dims, keepdim=True)
        grad_input = inner - along if ctx.rms else inner - inner.mean(ctx.dims, keepdim=True) - along
        return (grad_input * inverse).to(ctx.dtype), grad_weight, grad_bias, None, None, None, None
