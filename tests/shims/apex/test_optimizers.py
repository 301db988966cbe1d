"""apex's optimizers against torch's, and LAMB and NovoGrad against closed forms in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from xtrain.base.errors import NotImplementedYetError
from xtrain.optim.build import check_elementwise
from xtrain.shims.apex import optimizers

STEPS = 4


def params(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((4, 3), (5,))]


def grads(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 3), (5,))]


def train(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> list[nn.Parameter]:
    for step in range(STEPS):
        for param, grad in zip(trained, grads(step), strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return trained


@pytest.mark.parametrize(
    ("name", "options", "reference", "reference_options"),
    [
        ("FusedAdam", {"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        ("FusedAdam", {"weight_decay": 0.1, "adam_w_mode": False}, torch.optim.Adam, {"weight_decay": 0.1}),
        ("FusedAdam", {"capturable": True, "weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1}),
        ("FusedSGD", {"momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD, None),
        ("FusedSGD", {"momentum": 0.9, "nesterov": True}, torch.optim.SGD, None),
        ("FusedSGD", {"momentum": 0.9, "dampening": 0.3}, torch.optim.SGD, None),
        ("FusedSGD", {}, torch.optim.SGD, None),
        ("FusedAdagrad", {"weight_decay": 0.1}, torch.optim.Adagrad, None),
    ],
)
def test_as_torch_has_it(name, options, reference, reference_options):
    ours, theirs = params(), params()
    wanted = options if reference_options is None else reference_options
    train(getattr(optimizers, name)(ours, lr=0.05, **options), ours)
    train(reference(theirs, lr=0.05, **wanted), theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=3e-6, atol=1e-6)


def test_adam_without_bias_correction_against_float64():
    trained = params()
    train(optimizers.FusedAdam(trained, lr=0.05, bias_correction=False, eps=1e-6), trained)
    for place, found in enumerate(trained):
        p = params()[place].detach().double()
        m = v = torch.zeros_like(p)
        for step in range(STEPS):
            g = grads(step)[place].double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - 0.05 * m / (v.sqrt() + 1e-6)
        torch.testing.assert_close(found.double(), p, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adam_in_16_bits_keeps_float32_moments(dtype):
    trained = params(dtype)
    optimizer = optimizers.FusedAdam(trained, lr=0.05)
    train(optimizer, trained)
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())
    exact = params(dtype)[1].detach().double()
    assert not torch.equal(trained[1].double(), exact)


def test_adam_with_masters_follows_float32():
    trained = params(torch.float16)
    exact = [nn.Parameter(param.detach().float()) for param in trained]
    train(optimizers.FusedAdam(trained, lr=0.05, capturable=True, master_weights=True), trained)
    optimizer = optimizers.FusedAdam(exact, lr=0.05)
    for step in range(STEPS):
        for param, grad in zip(exact, grads(step), strict=True):
            param.grad = grad.half().float()
        optimizer.step()
    for one, other in zip(trained, exact, strict=True):
        torch.testing.assert_close(one, other.half(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_lamb_against_float64(decay):
    trained = params()
    train(optimizers.FusedLAMB(trained, lr=0.05, weight_decay=decay, max_grad_norm=1.0), trained)
    p = [param.detach().double() for param in params()]
    m = [torch.zeros_like(param) for param in p]
    v = [torch.zeros_like(param) for param in p]
    for step in range(1, STEPS + 1):
        given = [grad.double() for grad in grads(step - 1)]
        norm = math.sqrt(sum(float(grad.square().sum()) for grad in given))
        for place in range(2):
            g = given[place] / max(norm, 1.0)
            m[place] = 0.9 * m[place] + 0.1 * g
            v[place] = 0.999 * v[place] + 0.001 * g * g
            update = m[place] / (1 - 0.9**step) / ((v[place] / (1 - 0.999**step)).sqrt() + 1e-6)
            update = update + decay * p[place]
            ratio = float(p[place].norm() / update.norm()) if decay else 1.0
            p[place] = p[place] - 0.05 * ratio * update
    for found, wanted in zip(trained, p, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("norm_type", [0, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_novograd_against_float64(norm_type, inside):
    trained = params()
    optimizer = optimizers.FusedNovoGrad(
        trained, lr=0.05, betas=(0.9, 0.98), weight_decay=0.02, reg_inside_moment=inside, norm_type=norm_type
    )
    train(optimizer, trained)
    for place, found in enumerate(trained):
        p = params()[place].detach().double()
        m, v = torch.zeros_like(p), None
        for step in range(1, STEPS + 1):
            g = grads(step - 1)[place].double()
            size = g.abs().max() if norm_type == 0 else g.norm()
            v = size if v is None else v
            v = 0.98 * v + 0.02 * size if norm_type == 0 else (0.98 * v**2 + 0.02 * size**2).sqrt()
            under = v / math.sqrt(1 - 0.98**step) + 1e-8
            if inside:
                m = 0.9 * m + 0.1 * (g / under + 0.02 * p)
                p = p - 0.05 * m / (1 - 0.9**step)
            else:
                m = 0.9 * m + 0.1 * g
                p = p - 0.05 * (m / (1 - 0.9**step) / under + 0.02 * p)
        torch.testing.assert_close(found.double(), p, rtol=5e-6, atol=2e-6)


def test_state_goes_through_a_checkpoint():
    whole, first = params(), params()
    train(optimizers.FusedAdam(whole, lr=0.05), whole)
    optimizer = optimizers.FusedAdam(first, lr=0.05)
    for step in range(2):
        for param, grad in zip(first, grads(step), strict=True):
            param.grad = grad
        optimizer.step()
    resumed = optimizers.FusedAdam(first, lr=0.05)
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(2, STEPS):
        for param, grad in zip(first, grads(step), strict=True):
            param.grad = grad
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, first, strict=True))


def test_what_apex_refuses():
    with pytest.raises(RuntimeError, match="AMSGrad"):
        optimizers.FusedAdam(params(), amsgrad=True)
    with pytest.raises(RuntimeError, match="capturable"):
        optimizers.FusedAdam(params(), master_weights=True)
    with pytest.raises(RuntimeError, match=r"call step\(\) alone"):
        optimizers.FusedAdam(params()).step(scale=2.0)
    with pytest.raises(ValueError, match="learning rate"):
        optimizers.FusedSGD(params())
    with pytest.raises(ValueError, match="Nesterov"):
        optimizers.FusedSGD(params(), lr=0.1, nesterov=True)
    with pytest.raises(NotImplementedYetError, match="FusedMixedPrecisionLamb"):
        optimizers.FusedMixedPrecisionLamb(params())
    trained = [nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    trained[0].grad = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"FusedAdam takes .* not torch.float64"):
        optimizers.FusedAdam(trained).step()


def test_zero_grad_removes_or_clears():
    trained = params()
    for param in trained:
        param.grad = torch.ones_like(param)
    optimizers.FusedSGD(trained, lr=0.1).zero_grad()
    assert all(param.grad is not None and not param.grad.any() for param in trained)
    optimizers.FusedAdam(trained).zero_grad()
    assert all(param.grad is None for param in trained)


def test_zero_may_divide_those_that_are_elementwise():
    check_elementwise(optimizers.FusedAdam(params()), stage=2, allow_untested=False)
    check_elementwise(optimizers.FusedSGD(params(), lr=0.1), stage=2, allow_untested=False)
    with pytest.raises(ValueError, match="FusedLAMB"):
        check_elementwise(optimizers.FusedLAMB(params()), stage=2, allow_untested=False)


def _losses(make: Callable[..., torch.optim.Optimizer], stage: int) -> list[float]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}, "log_level": "error"}
    engine, *_ = xtrain.initialize(model=net, optimizer=make(net.parameters()), config=config)
    found = []
    for step in range(3):
        loss = engine(grads(step)[0]).square().mean()
        engine.backward(loss)
        engine.step()
        found.append(float(loss.detach()))
    engine.destroy()
    return found


def _through_the_engine() -> list[bool]:
    def ours(params: Any) -> torch.optim.Optimizer:
        return optimizers.FusedAdam(params, lr=0.1, weight_decay=0.1)

    def theirs(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.1, weight_decay=0.1)

    return [_losses(ours, stage) == pytest.approx(_losses(theirs, stage), rel=1e-5) for stage in range(4)]


def test_the_engine_takes_them_in_every_stage(ranks):
    assert ranks(1, _through_the_engine)[0] == [True] * 4
