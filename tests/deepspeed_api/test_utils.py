"""xtrain.runtime.utils, against closed forms and float64."""

from __future__ import annotations

import math

import pytest
import torch

from xtrain.runtime.utils import clip_grad_norm_


@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_clipping(norm_type: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (7, 300)]
    params.append(torch.nn.Parameter(torch.zeros(3, dtype=dtype)))  # without a gradient
    for param in params[:2]:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    whole = torch.cat([param.grad.double() for param in params[:2] if param.grad is not None])
    expected = float(torch.linalg.vector_norm(whole, norm_type))
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert float(clip_grad_norm_(params, 0.5, norm_type)) == pytest.approx(expected, rel=1e-6)
    clipped = torch.cat([param.grad.double() for param in params[:2] if param.grad is not None])
    assert float(torch.linalg.vector_norm(clipped, norm_type)) == pytest.approx(0.5, rel=tolerance)
    assert params[2].grad is None


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    """PyTorch's own adds a million equal squares in float32 on the host, and is off by almost a part in a thousand."""
    param = torch.nn.Parameter(torch.zeros(1_000_000))
    param.grad = torch.full_like(param, 0.1)
    assert float(clip_grad_norm_(param, 1e9)) == pytest.approx(
        math.sqrt(1e6) * float(torch.tensor(0.1)), rel=1e-6
    )
    assert float(clip_grad_norm_(torch.nn.Parameter(torch.zeros(3)), 1.0)) == 0.0
