"""apex's norms against torch's and float64, with their gradients, dtypes and memory-efficient forms."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xtrain.shims.apex import normalization
from xtrain.shims.apex.contrib.layer_norm import FastLayerNorm
from xtrain.shims.apex.contrib.layer_norm.layer_norm import FastLayerNormFN
from xtrain.shims.apex.normalization import fused_layer_norm as functions

SHAPE = (4, 6)


def given(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def trained(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in module.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) + 0.5)
    return module


def in_float64(module: nn.Module, input: torch.Tensor) -> torch.Tensor:
    x = input.double()
    dims = (-2, -1)
    if not module.rms:
        x = x - x.mean(dims, keepdim=True)
    x = x / (x.square().mean(dims, keepdim=True) + module.eps).sqrt()
    for operation, name in ((torch.mul, "weight"), (torch.add, "bias")):
        value = getattr(module, name, None)
        x = x if value is None else operation(x, value.double())
    return x


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", ["FusedLayerNorm", "FusedRMSNorm"])
def test_values_and_gradients_against_float64(name, affine, memory_efficient):
    module = trained(getattr(normalization, name)(SHAPE, 1e-5, affine, memory_efficient))
    ours, exact = given(), given()
    weights = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3))
    found, wanted = module(ours), in_float64(module, exact)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    first = [param.grad.clone() for param in module.parameters()]
    module.zero_grad()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-4, atol=1e-5)
    for one, param in zip(first, module.parameters(), strict=True):
        torch.testing.assert_close(one, param.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    plain = trained(normalization.FusedLayerNorm(SHAPE)).to(dtype)
    assert plain(given(dtype)).dtype == dtype
    torch.testing.assert_close(
        plain(given(dtype)), F.layer_norm(given(dtype), SHAPE, plain.weight, plain.bias, 1e-5)
    )
    mixed = trained(normalization.MixedFusedLayerNorm(SHAPE))
    assert mixed(given(dtype)).dtype == torch.float32
    assert (
        trained(normalization.MixedFusedRMSNorm(SHAPE, memory_efficient=True))(given(dtype)).dtype
        == torch.float32
    )
    assert normalization.FusedRMSNorm(SHAPE)(given(dtype)).dtype == dtype


def test_functions_are_the_modules():
    module = trained(normalization.FusedLayerNorm(SHAPE))
    wanted = module(given())
    args = (given(), module.weight, module.bias, SHAPE, module.eps)
    assert torch.equal(functions.fused_layer_norm_affine(*args), wanted)
    assert torch.equal(functions.FusedLayerNormAffineFunction.apply(*args), wanted)
    assert torch.equal(functions.mixed_dtype_fused_layer_norm_affine(*args), wanted)
    for function in (functions.FusedLayerNormAffineFunction, FastLayerNormFN):  # as Megatron asks
        assert "memory_efficient" in inspect.getfullargspec(function.forward).args
    rms = trained(normalization.FusedRMSNorm(SHAPE))
    torch.testing.assert_close(
        functions.manual_rms_norm(given(), SHAPE, rms.weight, 1e-5),
        functions.fused_rms_norm_affine(given(), rms.weight, SHAPE, 1e-5),
    )
    fast = trained(FastLayerNorm(6))
    wanted = F.layer_norm(given(), (6,), fast.weight, fast.bias, 1e-5)
    torch.testing.assert_close(fast(given()), wanted)
    torch.testing.assert_close(FastLayerNormFN.apply(given(), fast.weight, fast.bias, 1e-5), wanted)


def test_autocast_casts_as_apex_does():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert normalization.FusedLayerNorm(SHAPE)(given()).dtype == torch.bfloat16


def test_bad_input():
    with pytest.raises(RuntimeError, match="last dimensions"):
        normalization.FusedLayerNorm((5,))(given())
    with (
        pytest.warns(UserWarning, match="elementwise_affine"),
        pytest.raises(RuntimeError, match="elementwise_affine = False"),
    ):
        normalization.MixedFusedLayerNorm(SHAPE, elementwise_affine=False)
    with pytest.raises(TypeError, match="sequence"):
        normalization.MixedFusedLayerNorm(SHAPE, sequence=True)


def test_state_has_torchs_names():
    assert set(normalization.FusedLayerNorm(4).state_dict()) == {"weight", "bias"}
    assert set(normalization.FusedRMSNorm(4).state_dict()) == {"weight"}
    assert "eps=1e-05" in repr(normalization.FusedRMSNorm(4))
