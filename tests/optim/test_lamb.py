"""Lamb on slices against whole parameters in float64; its bits, its bytes, its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import training
from tests.optim import reference
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.ops.lamb import FusedLamb

LAMB = {"type": "Lamb", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-6, "max_coeff": 0.9}}


def _train(stage: int, micro: int, steps: int = 10, **more: Any) -> dict[str, Any]:
    return training.train(training.config(stage, micro, optimizer=LAMB, **more), steps)


def _decay(name: str) -> float:
    return 0.1 if name.endswith("weight") else 0.0  # training.param_groups


def _lamb(name: str, p: torch.Tensor, state: dict[str, Any], t: int, lr: float) -> None:
    reference.lamb(_decay(name), high=0.9)(name, p, state, t, lr)


@pytest.mark.parametrize(("ranks_", "stages"), [(1, (0, 2)), (2, (0, 1, 2, 3)), (4, (1, 2, 3))])
def test_slices_train_like_whole_parameters(ranks: Any, ranks_: int, stages: tuple[int, ...]) -> None:
    for stage in stages:
        result = ranks(ranks_, _train, stage, 4)[0]
        expected = reference.train(_lamb, result["rates"])
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight.detach(), rtol=1e-4, atol=1e-5)


def _aligned(stage: int, micro: int, bf16: bool) -> dict[str, Any]:
    return _train(stage, micro, bf16=bf16, xtrain={"aligned": True})


@pytest.mark.bits
@pytest.mark.parametrize("bf16", [False, True])
def test_aligned_bits_do_not_depend_on_the_cut(ranks: Any, bf16: bool) -> None:
    results = [
        ranks(n, _aligned, stage, micro, bf16)[0]
        for n, stage, micro in [(2, 0, 4), (2, 1, 4), (2, 2, 4), (2, 3, 4), (4, 1, 4), (1, 0, 4)]
    ]
    for result in results[1:]:
        assert result["losses"] == results[0]["losses"]
        assert all(torch.equal(result["weights"][n], w) for n, w in results[0]["weights"].items())


def _bytes(stage: int) -> tuple[int, int, int]:
    model = training.build_model()
    settings = training.config(stage, micro=8, optimizer=LAMB)
    engine, *_ = xtrain.initialize(model=model, model_parameters=model.parameters(), config=settings)
    training.engine_step(engine, 0)  # the first step also compares what arrived late
    xtrain.comm.ledger.reset()
    training.engine_step(engine, 1)
    elements = sum(group.layout.total for group in engine.optimizer.groups)
    return int(xtrain.comm.ledger.sent_bytes()), elements, len(engine.optimizer.optimizer.get_lamb_coeffs())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bytes_are_two_numbers_a_parameter(ranks: Any, stage: int) -> None:
    for sent, elements, parameters in ranks(2, _bytes, stage):
        # The test's loss; from stage 1 on the gradient norm, and two float64 sums a parameter.
        extra = 8 if stage == 0 else 8 + 8 + 2 * 8 * parameters
        assert sent == 2 * elements * 4 / 2 + extra
        assert parameters == 4


def _save(folder: str, stage: int, bf16: bool) -> list[float]:
    model = training.build_model()
    settings = training.config(stage, 4, bf16, optimizer=LAMB)
    engine, *_ = xtrain.initialize(
        model=model, model_parameters=training.param_groups(model), config=settings
    )
    for step in range(4):
        training.engine_step(engine, step)
    engine.save_checkpoint(folder)
    return [training.engine_step(engine, step) for step in range(4, 9)]


def _resume(folder: str, stage: int, bf16: bool) -> list[float]:
    model = training.build_model()
    settings = training.config(stage, 4, bf16, optimizer=LAMB)
    engine, *_ = xtrain.initialize(
        model=model, model_parameters=training.param_groups(model), config=settings
    )
    engine.load_checkpoint(folder)
    return [training.engine_step(engine, step) for step in range(4, 9)]


def test_checkpoints_load_into_other_numbers_of_ranks(ranks: Any, tmp_path: Path) -> None:
    whole = ranks(2, _save, str(tmp_path), 1, True)[0]
    assert ranks(2, _resume, str(tmp_path), 1, True)[0] == whole
    for n, stage in ((4, 2), (1, 0), (2, 3)):
        assert ranks(n, _resume, str(tmp_path), stage, True)[0] == pytest.approx(whole, rel=1e-2)


def _alone(seed: int = 0, **options: Any) -> tuple[Any, list[torch.nn.Parameter]]:
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(*shape).double()) for shape in ((7, 5), (5,), (3, 2, 2))]
    return FusedLamb(params, lr=0.02, betas=(0.9, 0.95), eps=1e-6, **options), params


def test_alone_it_updates_whole_parameters() -> None:
    optimizer, params = _alone(weight_decay=0.1)
    copies = [p.detach().clone() for p in params]
    states: list[dict[str, Any]] = [{} for _ in params]
    for t in range(1, 6):
        for p, copy, state in zip(params, copies, states, strict=True):
            p.grad = torch.randn_like(p)
            copy.grad = p.grad.clone()
            reference.lamb(0.1)("", copy, state, t, 0.02)
        optimizer.step()
        for p, copy in zip(params, copies, strict=True):
            torch.testing.assert_close(p.detach(), copy, rtol=1e-6, atol=1e-7)


def test_coefficients_are_reported_in_order_and_within_bounds() -> None:
    optimizer, params = _alone(max_coeff=0.5, min_coeff=0.3)
    params[1].data.zero_()  # no norm, no coefficient
    for p, size in zip(params, (1.0, 1.0, 100.0), strict=True):
        p.grad = torch.full_like(p, size)
    with torch.no_grad():
        params[0].mul_(1e-6)
        params[2].mul_(1e6)
    optimizer.step()
    assert optimizer.get_lamb_coeffs() == [0.3, 1.0, 0.5]


def test_eps_inside_the_root_and_no_bias_correction() -> None:
    optimizer, (param, *_) = _alone(eps_inside_sqrt=True, bias_correction=False, max_coeff=1e9)
    before, param.grad = param.detach().clone(), torch.randn_like(param)
    m, v = 0.1 * param.grad, 0.05 * param.grad**2
    u = m / (v + 1e-6).sqrt()
    optimizer.step()
    torch.testing.assert_close(
        param.detach(), before - 0.02 * before.norm() / u.norm() * u, rtol=1e-6, atol=0
    )


def test_what_it_does_not_take() -> None:
    with pytest.raises(NotImplementedYetError, match="amsgrad"):
        _alone(amsgrad=True)
    with pytest.raises(ConfigError, match="gradient_clipping"):
        _alone(max_grad_norm=1.0)
    with pytest.raises(ValueError, match="min_coeff"):
        _alone(min_coeff=2.0, max_coeff=1.0)
