"""`apex.normalization.fused_layer_norm`: norms over the last dimensions, computed in float32.

The plain functions give the input's dtype, the mixed ones that of the weight. With `memory_efficient` the output is
kept for the backward pass instead of the input.
"""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from xtrain.shims.apex.kernels.lists import wide
from xtrain.shims.apex.normalization.from_output import NormFromOutput

Shape = Sequence[int]


def _under_autocast(
    input: torch.Tensor, *params: torch.Tensor | None
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Everything in autocast's dtype where it is on, as apex casts."""
    device = input.device.type
    if not torch.is_autocast_enabled(device):
        return input, list(params)
    dtype = torch.get_autocast_dtype(device)
    return input.to(dtype), [None if given is None else given.to(dtype) for given in params]


def _norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shape: Shape,
    eps: float,
    memory_efficient: bool,
    rms: bool,
    mixed: bool,
) -> torch.Tensor:
    shape = (int(shape),) if isinstance(shape, numbers.Integral) else tuple(shape)
    if tuple(input.shape[-len(shape) :]) != shape:
        raise RuntimeError(f"the input's last dimensions must be {shape}, and it is {tuple(input.shape)}")
    input, (weight, bias) = _under_autocast(input, weight, bias)
    dtype = weight.dtype if mixed and weight is not None else input.dtype
    with torch.autocast(input.device.type, enabled=False):
        if memory_efficient:
            result: torch.Tensor = NormFromOutput.apply(input, weight, bias, shape, eps, rms, dtype)
            return result
        whole, scale, shift = wide(input), *(None if p is None else wide(p) for p in (weight, bias))
        if not rms:
            return F.layer_norm(whole, shape, scale, shift, eps).to(dtype)
        dims = tuple(range(-len(shape), 0))
        normal = whole * torch.rsqrt(whole.square().mean(dims, keepdim=True) + eps)
        return (normal if scale is None else normal * scale).to(dtype)


def fused_layer_norm_affine(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> torch.Tensor:
    """Layer norm with weight and bias, in the input's dtype."""
    return _norm(input, weight, bias, normalized_shape, eps, memory_efficient, rms=False, mixed=False)


def fused_layer_norm(
    input: torch.Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> torch.Tensor:
    """Layer norm without weight and bias."""
    return _norm(input, None, None, normalized_shape, eps, memory_efficient, rms=False, mixed=False)


def mixed_dtype_fused_layer_norm_affine(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> torch.Tensor:
    """Layer norm with weight and bias, in the weight's dtype."""
    return _norm(input, weight, bias, normalized_shape, eps, memory_efficient, rms=False, mixed=True)


def fused_rms_norm_affine(
    input: torch.Tensor,
    weight: torch.Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> torch.Tensor:
    """RMS norm with a weight, in the input's dtype."""
    return _norm(input, weight, None, normalized_shape, eps, memory_efficient, rms=True, mixed=False)


def fused_rms_norm(
    input: torch.Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> torch.Tensor:
    """RMS norm without a weight."""
    return _norm(input, None, None, normalized_shape, eps, memory_efficient, rms=True, mixed=False)


def mixed_dtype_fused_rms_norm_affine(
    input: torch.Tensor,
    weight: torch.Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> torch.Tensor:
    """RMS norm with a weight, in the weight's dtype."""
    return _norm(input, weight, None, normalized_shape, eps, memory_efficient, rms=True, mixed=True)


def manual_rms_norm(
    input: torch.Tensor, normalized_shape: Shape, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """RMS norm whose normalised input is rounded to a 16-bit weight's dtype before the product."""
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    normal = input * torch.rsqrt(input.float().square().mean(dims, keepdim=True) + eps)
    if weight is None:
        return normal
    return weight * (normal.to(weight.dtype) if weight.dtype in (torch.float16, torch.bfloat16) else normal)


class _Function:
    """Scripts call `.apply` of apex's autograd functions, and look at the arguments of `.forward`."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self.forward = self._function = function

    def apply(self, *args: Any) -> torch.Tensor:
        """The function's result."""
        return self._function(*args)


FusedLayerNormAffineFunction = _Function(fused_layer_norm_affine)
FusedLayerNormFunction = _Function(fused_layer_norm)
FusedLayerNormAffineMixedDtypesFunction = _Function(mixed_dtype_fused_layer_norm_affine)
FusedRMSNormAffineFunction = _Function(fused_rms_norm_affine)
FusedRMSNormFunction = _Function(fused_rms_norm)
FusedRMSNormAffineMixedDtypesFunction = _Function(mixed_dtype_fused_rms_norm_affine)


class _Norm(nn.Module):
    """What the modules share: weight ones, bias zeros."""

    mixed = False
    rms = False
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape = torch.Size(shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.memory_efficient = memory_efficient
        self.register_parameter("weight", nn.Parameter(torch.empty(shape)) if elementwise_affine else None)
        if not self.rms:
            self.register_parameter("bias", nn.Parameter(torch.empty(shape)) if elementwise_affine else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight ones, bias zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if not self.rms and self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The norm over the last dimensions."""
        bias = None if self.rms else self.bias
        return _norm(
            input,
            self.weight,
            bias,
            self.normalized_shape,
            self.eps,
            self.memory_efficient,
            self.rms,
            self.mixed,
        )

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


class FusedLayerNorm(_Norm):
    """Layer norm in the input's dtype."""


class FusedRMSNorm(_Norm):
    """RMS norm in the input's dtype."""

    rms = True


class _Mixed(_Norm):
    mixed = True

    def __init__(
        self,
        normalized_shape: int | Shape,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if "elementwise_affine" in kwargs:
            warnings.warn(f"{name} does not support `elementwise_affine` argument", stacklevel=2)
            if not kwargs.pop("elementwise_affine"):
                raise RuntimeError(f"{name} does not support `elementwise_affine = False`")
        if kwargs:
            raise TypeError(f"{name} got an unexpected argument {next(iter(kwargs))!r}")
        super().__init__(normalized_shape, eps, True, memory_efficient)


class MixedFusedLayerNorm(_Mixed):
    """Layer norm in the weight's dtype."""


class MixedFusedRMSNorm(_Mixed):
    """RMS norm in the weight's dtype."""

    rms = True
