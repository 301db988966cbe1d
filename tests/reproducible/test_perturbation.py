"""Perturbations of initial weights."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import training
from xtrain.base.errors import ConfigError
from xtrain.base.run_folder import PERTURB_VARIABLE
from xtrain.reproducible.perturbation import parse, perturb


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_one_ulp(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30).to(dtype)
    with torch.no_grad():
        model.bias[:5] = 0
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    perturb(model, seed=3)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
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
