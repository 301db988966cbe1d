"""Perturbations of initial weights."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import training
from xtrain.base.errors import ConfigError
from xtrain.base.run_folder import PERTURB_VARIABLE
from xtrain.reproducible.perturbation import SHARE, parse, perturb, perturb_rounding
from xtrain.zero.owners import owner_of

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_ulp(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30).to(dtype)
    with torch.no_grad():
        model.bias[:5] = 0
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    perturb(model, seed=3)
    bits = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for name, param in model.named_parameters():
        moved = param.detach().view(bits).to(torch.int64) - before[name].view(bits).to(torch.int64)
        assert moved[before[name] != 0].abs().tolist() == [1] * int((before[name] != 0).sum())
        assert (param[before[name] == 0] == 0).all()
        assert 0.3 < (moved > 0).double().mean() < 0.7 or name == "bias"
    once = {name: param.detach().clone() for name, param in model.named_parameters()}
    for seed in (3, 4):
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(before[name])
        perturb(model, seed=seed)
        assert all((param == once[name]).all() for name, param in model.named_parameters()) == (seed == 3)


def _ulps(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (found.detach().view(torch.int16).int() - expected.detach().view(torch.int16).int()).abs()


@pytest.mark.parametrize("dtype", HALF)
def test_in_16_bits_the_rounding_is_perturbed_and_not_the_weights(dtype: torch.dtype) -> None:
    """Outputs, the gradients by them, and those of parameters go to neighbours; what is wider stays."""

    def trained(seed: int | None, replica: int = 0) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        layer, head = nn.Linear(64, 64).to(dtype), nn.Linear(64, 1)
        model = nn.ModuleList([layer, head])
        before = layer.weight.detach().clone()
        if seed is not None:
            perturb(layer, seed)
            perturb_rounding(model, seed, replica)
        assert torch.equal(layer.weight.detach(), before)
        x = torch.randn(64, 64).to(dtype).requires_grad_()
        out = layer(x)
        head(out.float()).sum().backward()
        return out, layer.weight.grad, layer.bias.grad, head.weight.grad, x.grad

    plain, found = trained(None), trained(3)
    assert all(torch.equal(one, other) for one, other in zip(found, trained(3), strict=True))
    assert _ulps(found[0], plain[0]).max() == 1
    assert (_ulps(found[0], plain[0]) > 0).double().mean() == pytest.approx(SHARE, abs=0.05)
    for grad, exact in zip(found[1:3], plain[1:3], strict=True):
        assert not torch.equal(grad, exact)
        # From outputs' gradients that were rounded anew, each by an ulp at most.
        torch.testing.assert_close(grad.float(), exact.float(), rtol=0.05, atol=float(exact.abs().max()) / 20)
    assert found[3].dtype == torch.float32
    for other in (trained(4), trained(3, replica=1)):
        assert not torch.equal(other[0], found[0])


def test_what_is_evaluated_or_wider_than_16_bits_is_not_rounded_anew() -> None:
    model = nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Tanh())
    x = torch.randn(4, 8).bfloat16()
    exact = model(x)
    perturb_rounding(model, 1)
    assert not torch.equal(model(x), exact)
    model.eval()
    assert torch.equal(model(x), exact)
    wide = nn.Linear(8, 8)
    exact = wide(x.float())
    perturb_rounding(wide, 1)
    assert torch.equal(wide(x.float()), exact)


def _half(seed: str, aligned: bool, path: str) -> tuple[list[float], list[torch.Tensor]]:
    settings = training.config(1, micro=4, bf16=True, xtrain={"aligned": aligned})
    with pytest.MonkeyPatch.context() as patch:
        if seed:
            patch.setenv(PERTURB_VARIABLE, seed)
        model = training.build_model()
        engine, *_ = xtrain.initialize(
            model=model, model_parameters=training.param_groups(model), config=settings
        )
    owners = [owner_of(param) for param in engine.module.parameters()]
    masters = [owner.master() for owner in owners if owner is not None]
    start = [master.detach().clone() for master in masters if master is not None]
    return [training.engine_step(engine, step) for step in range(4)], start


@pytest.mark.parametrize("aligned", [False, True])
def test_an_engine_in_bfloat16_is_perturbed_by_rounding(ranks: Any, tmp_path: Path, aligned: bool) -> None:
    plain, again, first, second = (
        ranks(2, _half, seed, aligned, str(tmp_path)) for seed in ("", "", "1", "2")
    )
    assert plain[0][0] == again[0][0]
    assert len({tuple(run[0][0]) for run in (plain, first, second)}) == 3
    for rank in range(2):
        for master, exact in zip(first[rank][1], plain[rank][1], strict=True):
            apart = (master.view(torch.int32) - exact.view(torch.int32)).abs()
            assert apart[exact != 0].tolist() == [1] * int((exact != 0).sum())


def test_perturbation_by_size() -> None:
    model = nn.Linear(10, 10)
    before = model.weight.detach().clone()
    perturb(model, 1, 0.01)
    ratio = model.weight.detach() / before
    torch.testing.assert_close((ratio - 1).abs(), torch.full_like(ratio, 0.01), rtol=1e-3, atol=0)
    assert parse("7") == (7, None)
    assert parse("7:0.5") == (7, 0.5)
    for text in ("x", "-1", "1:2", "1:x", "1:0", ""):
        with pytest.raises(ConfigError, match="neither SEED"):
            parse(text)


def _weights(stage: int, init: bool, seed: str) -> dict[str, torch.Tensor]:
    settings = training.config(stage, micro=8)
    with pytest.MonkeyPatch.context() as patch:
        if seed:
            patch.setenv(PERTURB_VARIABLE, seed)
        context = xtrain.zero.Init(config_dict_or_path=settings) if init else nullcontext()
        with context:
            model = training.build_model()
        engine, *_ = xtrain.initialize(
            model=model, model_parameters=training.param_groups(model), config=settings
        )
    whole = engine.module_state_dict()
    return {name: value.detach().clone() for name, value in whole.items()}


def test_the_engine_starts_from_perturbed_weights(ranks: Any) -> None:
    """The same ones in every stage, on every rank, also where they were never whole."""
    plain = ranks(2, _weights, 0, False, "")[0]
    expected = training.build_model()
    perturb(expected, 5)
    for stage, init in ((0, False), (3, False), (3, True)):
        for found in ranks(2, _weights, stage, init, "5"):
            for name, param in expected.named_parameters():
                assert torch.equal(found[name], param.detach())
                assert not torch.equal(found[name], plain[name])
