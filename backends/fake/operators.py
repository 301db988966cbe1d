"""The operators that compute otherwise on an emulated chip: products, sums, softmax, normalisation.

Each function takes an operator's arguments and returns what it returns, or raises `HostArithmetic`. They are reached
below autograd: backward consists of the same operators.
When they run is decided in mode.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xtrain.backends.fake.profiles import Numerics
from xtrain.backends.fake.rounding import round_to

aten = torch.ops.aten
Operator = Callable[..., Any]
_LOW = (torch.float16, torch.bfloat16)
_EMULATED = (torch.float32, *_LOW)
_ACCUMULATORS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


class Arithmetic:
    """Products and sums of one chip.

    Args:
        exact: float32 inputs of products are not rounded, because aligned mode has switched that off.
    """

    def __init__(self, numerics: Numerics, exact: bool = False) -> None:
        self.numerics = numerics
        self.products = "fp32" if exact and numerics.switchable else numerics.products
        self.accumulator = _ACCUMULATORS[numerics.accumulation]
        self.changes_float32 = self.products != "fp32"
        self.changes_products = (
            self.changes_float32 or numerics.block > 0 or self.accumulator != torch.float32
        )

    # ---------------------------------------------------------------- products

    def input(self, x: torch.Tensor) -> torch.Tensor:
        """What the product sees of an input, as float32."""
        if x.dtype in _LOW:
            return x.to(torch.float32)
        return round_to(x, self.products, self.numerics.rounding, self.numerics.saturate)

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(..., m, k) times (..., k, n), in the accumulator's dtype and not yet rounded to the inputs'."""
        a, b = self.input(a), self.input(b)
        length = a.shape[-1]
        block = self.numerics.block or max(1, length)
        total = torch.zeros((), dtype=self.accumulator)
        if length == 0:
            return torch.matmul(a, b).to(self.accumulator)
        for start in range(0, length, block):
            part = torch.matmul(a[..., start : start + block], b[..., start : start + block, :])
            if start == 0:
                total = part.to(self.accumulator)
            elif self.accumulator == torch.float32:
                total.add_(part)
            else:
                # The sum of the two in the wider format, rounded once.
                wide = torch.promote_types(self.accumulator, torch.float32)
                total = (total.to(wide) + part.to(wide)).to(self.accumulator)
        return total

    def with_bias(
        self, bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: Any, alpha: Any
    ) -> torch.Tensor:
        """beta * bias + alpha * (a b), rounded once to the dtype of `a`."""
        result = self.product(a, b)
        if alpha != 1:
            result = result * alpha
        if beta != 0:
            wide = bias.to(result.dtype)
            result = result + (wide if beta == 1 else wide * beta)
        return result.to(a.dtype)

    # ---------------------------------------------------------------- sums

    def sum(self, x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
        """The sum over `dims`, which are kept with length 1; float32 (float64 for float64)."""
        if x.dtype in _LOW:
            x = x.to(torch.float32)
        if not self.numerics.sums:
            return x.sum(tuple(dims), keepdim=True)
        kept = [1 if dim in dims else size for dim, size in enumerate(x.shape)]
        if len(dims) == 1:
            return self._sum_along(x, dims[0])
        # All reduced dimensions become one, in their order.
        rest = [dim for dim in range(x.ndim) if dim not in dims]
        if list(dims) == list(range(len(dims))) and dims:
            return self._sum_along(x.reshape(-1, *(x.shape[dim] for dim in rest)), 0).reshape(kept)
        flat = x.permute(*rest, *dims).reshape(*(x.shape[dim] for dim in rest), -1)
        return self._sum_along(flat, flat.ndim - 1).reshape(kept)

    def _sum_along(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        length = x.shape[dim]
        if length == 0:
            return x.sum(dim, keepdim=True)
        workers = -(-length // self.numerics.sums)
        total = x.narrow(dim, 0, workers).clone()
        for start in range(workers, length, workers):
            count = min(workers, length - start)
            total.narrow(dim, 0, count).add_(x.narrow(dim, start, count))
        while workers > 1:
            half = (workers + 1) // 2
            total.narrow(dim, 0, workers - half).add_(total.narrow(dim, half, workers - half))
            total, workers = total.narrow(dim, 0, half), half
        return total


class HostArithmetic(Exception):
    """The operator computes as on the host: in float64 or integers, say."""


def _need(differs: Any, *tensors: torch.Tensor | None) -> None:
    """Leave an operator to the host unless it differs, and its tensors are the host's in a dtype that is emulated.

    Raises:
        HostArithmetic
    """
    given = [tensor for tensor in tensors if tensor is not None]
    emulated = (t.dtype in _EMULATED and t.device.type == "cpu" and t.layout == torch.strided for t in given)
    if not differs or not all(emulated):
        raise HostArithmetic


# ---------------------------------------------------------------- products


def _mm(arithmetic: Arithmetic, a: torch.Tensor, b: torch.Tensor) -> Any:
    _need(arithmetic.changes_products, a, b)
    return arithmetic.product(a, b).to(a.dtype)


def _mv(arithmetic: Arithmetic, a: torch.Tensor, x: torch.Tensor) -> Any:
    return _mm(arithmetic, a, x[:, None])[:, 0]


def _dot(arithmetic: Arithmetic, x: torch.Tensor, y: torch.Tensor) -> Any:
    return _mm(arithmetic, x[None, :], y[:, None])[0, 0].clone()


def _addmm(
    arithmetic: Arithmetic,
    bias: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    _need(arithmetic.changes_products, bias, a, b)
    return arithmetic.with_bias(bias, a, b, beta, alpha)


def _addmv(
    arithmetic: Arithmetic,
    bias: torch.Tensor,
    a: torch.Tensor,
    x: torch.Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    return _addmm(arithmetic, bias[:, None], a, x[:, None], beta=beta, alpha=alpha)[:, 0]


def _convolution(arithmetic: Arithmetic, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> Any:
    _need(arithmetic.changes_float32 and x.dtype == torch.float32, x, weight)
    return aten.convolution.default(arithmetic.input(x), arithmetic.input(weight), *rest)


def _convolution_backward(
    arithmetic: Arithmetic, grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any
) -> Any:
    _need(arithmetic.changes_float32 and x.dtype == torch.float32, grad, x, weight)
    rounded = (arithmetic.input(tensor) for tensor in (grad, x, weight))
    return aten.convolution_backward.default(*rounded, *rest)


# ---------------------------------------------------------------- sums


def _dims(x: torch.Tensor, dim: Any) -> list[int]:
    given = [dim] if isinstance(dim, int) else list(dim or range(x.ndim))
    return sorted(d % x.ndim for d in given) if x.ndim else []


def _reduced(
    arithmetic: Arithmetic,
    x: torch.Tensor,
    dim: Any,
    keepdim: bool,
    dtype: torch.dtype | None,
    mean: bool,
) -> Any:
    _need(arithmetic.numerics.sums and x.ndim and (dtype or x.dtype) in _EMULATED, x)
    dims = _dims(x, dim)
    total = arithmetic.sum(x, dims)
    if mean:
        total = total / _count(x, dims)
    total = total.to(dtype or x.dtype)
    # A fresh tensor, as the operator promises.
    return (
        total.clone()
        if keepdim
        else total.reshape([s for d, s in enumerate(x.shape) if d not in dims]).clone()
    )


def _count(x: torch.Tensor, dims: Sequence[int]) -> int:
    return math.prod(x.shape[dim] for dim in dims)


def _sum(
    arithmetic: Arithmetic, x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    return _reduced(arithmetic, x, dim, keepdim, dtype, mean=False)


def _mean(
    arithmetic: Arithmetic, x: torch.Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    return _reduced(arithmetic, x, dim, keepdim, dtype, mean=True)


def _variance(arithmetic: Arithmetic, x: torch.Tensor, dims: list[int], correction: Any) -> tuple[Any, Any]:
    """(variance, mean) over `dims`, kept: the mean first, then the squares of what differs from it."""
    wide = x.to(torch.float32)
    count = _count(x, dims)
    mean = arithmetic.sum(wide, dims) / count
    freedom = max(0, count - (1 if correction is None else correction))
    return arithmetic.sum((wide - mean).square(), dims) / freedom, mean


def _var(
    arithmetic: Arithmetic, x: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> Any:
    return _var_mean(arithmetic, x, dim, correction=correction, keepdim=keepdim)[0]


def _var_mean(
    arithmetic: Arithmetic, x: torch.Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> Any:
    _need(arithmetic.numerics.sums and x.ndim, x)
    dims = _dims(x, dim)
    shape = [1 if d in dims else s for d, s in enumerate(x.shape) if keepdim or d not in dims]
    return tuple(
        item.to(x.dtype).reshape(shape).clone() for item in _variance(arithmetic, x, dims, correction)
    )


def _vector_norm(
    arithmetic: Arithmetic,
    x: torch.Tensor,
    order: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    _need(arithmetic.numerics.sums and order == 2 and x.ndim, x)
    squares = x.to(dtype or x.dtype).square()
    return _reduced(arithmetic, squares, dim, keepdim, dtype, mean=False).sqrt()


def _foreach_norm(
    arithmetic: Arithmetic, tensors: Sequence[torch.Tensor], order: Any = 2, dtype: Any = None
) -> Any:
    return [_vector_norm(arithmetic, x.reshape(-1), order, dtype=dtype) for x in tensors]


# ---------------------------------------------------------------- softmax


def _softmax(arithmetic: Arithmetic, x: torch.Tensor, dim: int, half_to_float: Any = False) -> Any:
    _need(arithmetic.numerics.sums and x.ndim, x)
    wide = x.to(torch.float32)
    powers = (wide - wide.amax(dim, keepdim=True)).exp_()
    return (powers / arithmetic.sum(powers, [dim % x.ndim])).to(x.dtype)


def _safe_softmax(arithmetic: Arithmetic, x: torch.Tensor, dim: int, dtype: Any = None) -> Any:
    result = _softmax(arithmetic, x if dtype is None else x.to(dtype), dim)
    return result.masked_fill((x == float("-inf")).all(dim, keepdim=True), 0.0)


def _softmax_backward(
    arithmetic: Arithmetic, grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    _need(arithmetic.numerics.sums and y.ndim, grad, y)
    product = grad.to(torch.float32) * y.to(torch.float32)
    total = arithmetic.sum(product, [dim % y.ndim])
    return (product - y.to(torch.float32) * total).to(dtype)


def _log_softmax(arithmetic: Arithmetic, x: torch.Tensor, dim: int, half_to_float: Any = False) -> Any:
    _need(arithmetic.numerics.sums and x.ndim, x)
    wide = x.to(torch.float32)
    shifted = wide - wide.amax(dim, keepdim=True)
    return (shifted - arithmetic.sum(shifted.exp(), [dim % x.ndim]).log()).to(x.dtype)


def _log_softmax_backward(
    arithmetic: Arithmetic, grad: torch.Tensor, y: torch.Tensor, dim: int, dtype: torch.dtype
) -> Any:
    _need(arithmetic.numerics.sums and y.ndim, grad, y)
    wide = grad.to(torch.float32)
    return (wide - y.to(torch.float32).exp() * arithmetic.sum(wide, [dim % y.ndim])).to(dtype)


def _nll_loss(
    arithmetic: Arithmetic,
    x: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: int,
    ignore: int,
) -> Any:
    _need(arithmetic.numerics.sums and weight is None and reduction != 0 and x.ndim == 2, x)
    kept = target != ignore
    picked = -x.gather(1, target.clamp(0, x.shape[1] - 1)[:, None])[:, 0]
    count = kept.sum().to(x.dtype)
    total = arithmetic.sum(picked * kept, [0])[0]
    return (total / count if reduction == 1 else total).to(x.dtype), count


def _mse_loss(arithmetic: Arithmetic, x: torch.Tensor, target: torch.Tensor, reduction: int = 1) -> Any:
    _need(reduction != 0, x, target)
    squares = (x - target).square()
    return _reduced(arithmetic, squares, None, False, None, mean=reduction == 1)


# ---------------------------------------------------------------- normalisation


def _layer_norm(
    arithmetic: Arithmetic,
    x: torch.Tensor,
    shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Any:
    _need(arithmetic.numerics.sums, x, weight, bias)
    dims = list(range(x.ndim - len(shape), x.ndim))
    variance, mean = _variance(arithmetic, x, dims, 0)
    rstd = (variance + eps).rsqrt()
    result = (x.to(torch.float32) - mean) * rstd
    if weight is not None:
        result = result * weight.to(torch.float32)
    if bias is not None:
        result = result + bias.to(torch.float32)
    # As the host's: statistics in the parameters' dtype where these are float32 beside a 16-bit input.
    kept = weight.dtype if weight is not None else x.dtype
    return result.to(x.dtype), mean.to(kept), rstd.to(kept)


def _layer_norm_backward(
    arithmetic: Arithmetic,
    grad: torch.Tensor,
    x: torch.Tensor,
    shape: Sequence[int],
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: Sequence[bool],
) -> Any:
    _need(arithmetic.numerics.sums, grad, x, mean, rstd, weight, bias)
    inner = list(range(x.ndim - len(shape), x.ndim))
    outer = list(range(x.ndim - len(shape)))
    wide = grad.to(torch.float32)
    normal = (x.to(torch.float32) - mean) * rstd.to(torch.float32)
    scaled = wide if weight is None else wide * weight.to(torch.float32)
    count = _count(x, inner)
    results: list[torch.Tensor | None] = [None, None, None]
    if mask[0]:
        average = arithmetic.sum(scaled, inner) / count
        along = arithmetic.sum(scaled * normal, inner) / count
        results[0] = ((scaled - average - normal * along) * rstd.to(torch.float32)).to(x.dtype)
    if mask[1] and weight is not None:
        results[1] = arithmetic.sum(wide * normal, outer).reshape(tuple(shape)).to(weight.dtype)
    if mask[2] and bias is not None:
        results[2] = arithmetic.sum(wide, outer).reshape(tuple(shape)).to(bias.dtype)
    return tuple(results)


OPERATORS: dict[Any, Operator] = {
    aten.mm.default: _mm,
    aten.bmm.default: _mm,
    aten.mv.default: _mv,
    aten.dot.default: _dot,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.addmv.default: _addmv,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.var.correction: _var,
    aten.var_mean.correction: _var_mean,
    aten.linalg_vector_norm.default: _vector_norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _safe_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._log_softmax.default: _log_softmax,
    aten._log_softmax_backward_data.default: _log_softmax_backward,
    aten.nll_loss_forward.default: _nll_loss,
    aten.mse_loss.default: _mse_loss,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}
"""By operator. sum.default and mean.default take their dtype by name, so one function serves two overloads."""

FUSED = frozenset(
    """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward mkldnn_rnn_layer
    mkldnn_rnn_layer_backward _addmm_activation addbmm _transformer_encoder_layer_fwd _native_multi_head_attention
    _cdist_forward _euclidean_dist mkldnn_linear mkldnn_convolution _int_mm _grouped_mm _scaled_mm
    """.split()  # noqa: SIM905
)
"""Operators with products inside that are not emulated: refused rather than computed as on the host."""
