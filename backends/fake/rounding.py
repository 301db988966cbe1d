"""Rounding of single numbers as other chips do it, exact to the bit. Which operators use it is in operators.py."""

from __future__ import annotations

import torch

_DROPPED = {"tf32": 13, "hf32": 12}
"""Low bits of a float32 that the format does not have."""
_CAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST_HALF = 65504.0


def shorten(x: torch.Tensor, dropped: int, rounding: str) -> torch.Tensor:
    """A float32 tensor without the lowest `dropped` mantissa bits; NaN and infinity stay.

    Magnitudes are integers in order: adding to the bits rounds, and a carry goes into the exponent as it should.
    """
    bits = x.contiguous().view(torch.int32)
    if rounding == "toward-zero":
        rounded = bits & -(1 << dropped)
    else:
        rounded = bits + (1 << (dropped - 1))
        if rounding == "nearest-even":
            # One less where the bit above is even, so that a tie stays below.
            rounded.sub_((bits >> dropped).bitwise_and_(1).bitwise_xor_(1))
        rounded.bitwise_and_(-(1 << dropped))
    result = rounded.view(torch.float32)
    # A NaN's bits may round to those of infinity; the maximum of a tensor with a NaN is NaN.
    return torch.where(x.isnan(), x, result) if x.numel() and bool(x.amax().isnan()) else result


def round_to(
    x: torch.Tensor, name: str, rounding: str = "nearest-even", saturate: bool = False
) -> torch.Tensor:
    """A float32 tensor rounded to what a format holds, as float32.

    Args:
        saturate: numbers beyond the largest float16 become it.
    """
    if name in _DROPPED:
        return shorten(x, _DROPPED[name], rounding)
    if name == "fp16" and saturate:
        x = x.clamp(-LARGEST_HALF, LARGEST_HALF)
    return x.to(_CAST[name]).to(torch.float32) if name in _CAST else x


def flush_(x: torch.Tensor) -> torch.Tensor:
    """Set numbers below the smallest normal one of the dtype to (positive) zero, in place; NaN stays."""
    info = torch.finfo(x.dtype)
    largest_denormal = info.smallest_normal * (1 - info.eps)
    if x.is_contiguous() and not x._is_view():
        return torch.ops.aten.hardshrink.out(x, largest_denormal, out=x)  # one pass
    return x.copy_(torch.nn.functional.hardshrink(x, largest_denormal))


def saturate_(x: torch.Tensor) -> bool:
    """Replace infinities of a float16 tensor by the largest number, in place; whether there were any."""
    overflowed = bool(x.isinf().any())
    if overflowed:
        x.clamp_(-LARGEST_HALF, LARGEST_HALF)
    return overflowed
