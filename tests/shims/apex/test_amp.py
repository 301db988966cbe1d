"""apex.amp, apex.fp16_utils and the small modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xtrain.base.errors import NotImplementedYetError
from xtrain.shims.apex import amp, apex_C, fp16_utils
from xtrain.shims.apex.contrib.clip_grad import clip_grad_norm_
from xtrain.shims.apex.contrib.xentropy import SoftmaxCrossEntropyLoss
from xtrain.shims.apex.fused_dense import FusedDense, FusedDenseGeluDense
from xtrain.shims.apex.mlp import MLP
from xtrain.shims.apex.optimizers import FusedAdam


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)


def prepared(level: str, **options: object) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = FusedAdam(model.parameters(), lr=0.01)
    return amp.initialize(model, optimizer, opt_level=level, verbosity=0, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int, accumulate: int = 1) -> float:
    for part in range(accumulate):
        inputs, wanted = batch(number * accumulate + part)
        loss = F.mse_loss(model(inputs), wanted) / accumulate
        with amp.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_levels_train_like_float32(level):
    exact = network()
    reference = torch.optim.AdamW(exact.parameters(), lr=0.01, weight_decay=0)
    model, optimizer = prepared(level)
    for number in range(3):
        loss = step(model, optimizer, number, accumulate=2)
        for part in range(2):
            inputs, wanted = batch(number * 2 + part)
            true = F.mse_loss(exact(inputs), wanted) / 2
            true.backward()
        reference.step()
        reference.zero_grad()
        assert loss == pytest.approx(float(true.detach()), rel=1e-6 if level == "O0" else 2e-2)
    halves = {param.dtype for param in model.parameters()}
    assert (
        halves
        == {
            "O0": {torch.float32},
            "O1": {torch.float32},
            "O2": {torch.float16, torch.float32},
            "O3": {torch.float16},
        }[level]
    )
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {
        torch.float32
    }
    assert {param.dtype for param in amp.master_params(optimizer)} == (
        {torch.float16} if level == "O3" else {torch.float32}
    )


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_an_overflow_skips_the_step_and_halves_the_scale(level):
    model, optimizer = prepared(level)
    step(model, optimizer, 0)
    before = copy.deepcopy(model.state_dict())
    scale = amp._amp_state.loss_scalers[0].loss_scale()
    with amp.scale_loss(model(batch(1)[0]).sum() * math.inf, optimizer) as scaled:
        scaled.backward()
    optimizer.step()
    optimizer.zero_grad()
    names = [name for name, _ in model.named_parameters()]
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in names)
    assert amp.state_dict()["loss_scaler0"] == {"loss_scale": scale / 2, "unskipped": 0}
    step(model, optimizer, 2)
    assert not all(torch.equal(before[name], model.state_dict()[name]) for name in names)


def test_the_scale_doubles_and_is_restored():
    prepared("O2", loss_scale="dynamic", max_loss_scale=2.0**17)
    amp.load_state_dict({"loss_scaler0": {"loss_scale": 2.0**16, "unskipped": 1998}})
    scaler = amp._amp_state.loss_scalers[0]
    assert [scaler.update(False), scaler.loss_scale(), scaler.update(False), scaler.loss_scale()] == [
        False, 2.0**16, False, 2.0**17,
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="Unexpected key"):
        amp.load_state_dict({"model": {}})


def test_gradients_are_unscaled_once_when_that_is_delayed():
    model, optimizer = prepared("O2", loss_scale=128.0)
    for part, delay in ((0, True), (1, False)):
        with amp.scale_loss(model(batch(part)[0]).sum(), optimizer, delay_unscale=delay) as scaled:
            scaled.backward()
    exact = network()
    for part in range(2):
        exact(batch(part)[0]).sum().backward()
    for found, wanted in zip(amp.master_params(optimizer), exact.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=2e-2, atol=2e-2)


def test_a_schedule_goes_around_the_patched_step():
    model, optimizer = prepared("O1")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    step(model, optimizer, 0)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.005


def test_decorators_cast_in_o1_only():
    def kinds(*tensors: torch.Tensor) -> list[torch.dtype]:
        return [given.dtype for given in tensors]

    given = (torch.ones(1), torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.int64))
    prepared("O0")
    assert amp.half_function(kinds)(*given) == kinds(*given)
    prepared("O1")
    assert amp.half_function(kinds)(*given) == [torch.float16, torch.float16, torch.int64]
    assert amp.float_function(kinds)(*given) == [torch.float32, torch.float32, torch.int64]
    assert amp.promote_function(kinds)(*given) == [torch.float32, torch.float32, torch.int64]
    with amp.disable_casts():
        assert amp.half_function(kinds)(*given) == kinds(*given)
    with pytest.raises(ValueError, match="nothing"):
        amp.register_half_function(torch, "nothing")


def test_bad_input_of_initialize():
    with pytest.raises(RuntimeError, match="Unexpected optimization level 02"):
        amp.initialize(network(), opt_level="02")
    with pytest.raises(RuntimeError, match="float16 already"):
        amp.initialize(network().half(), opt_level="O1", verbosity=0)
    with pytest.raises(RuntimeError, match="no place in O1"):
        amp.initialize(network(), opt_level="O1", master_weights=True)
    with pytest.raises(TypeError, match="optimizers must be"):
        amp.initialize(network(), 3)
    model = network()
    assert amp.initialize(model, enabled=False) is model


def test_fp16_utils_by_hand():
    model = fp16_utils.network_to_half(network())
    assert model[1][1].weight.dtype == torch.float32
    params, masters = fp16_utils.prep_param_lists(model)
    model(batch(0)[0]).float().sum().backward()
    fp16_utils.model_grads_to_master_grads(params, masters)
    assert all(torch.equal(m.grad, p.grad.float()) for p, m in zip(params, masters, strict=True))
    with torch.no_grad():
        for master in masters:
            master += 1
    fp16_utils.master_params_to_model_params(params, masters)
    assert all(torch.equal(p, m.to(p.dtype)) for p, m in zip(params, masters, strict=True))
    with pytest.raises(ValueError, match="flat_master=False"):
        fp16_utils.prep_param_lists(model, flat_master=True)
    half = nn.Linear(3, 2).half()
    params, [flat] = fp16_utils.prep_param_lists(half, flat_master=True)
    half(torch.ones(1, 3).half()).sum().backward()
    fp16_utils.model_grads_to_master_grads(params, [flat], flat_master=True)
    assert torch.equal(flat.grad, apex_C.flatten([p.grad for p in params]).float())
    with pytest.raises(NotImplementedYetError, match="FP16_Optimizer"):
        fp16_utils.FP16_Optimizer(None)


def test_dynamic_loss_scaler_of_fp16_utils():
    scaler = fp16_utils.DynamicLossScaler(init_scale=8, scale_window=2)
    param = nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([1.0, math.nan])
    assert scaler.has_overflow([param])
    scaler.update_scale(True)
    for _ in range(2):
        scaler.update_scale(False)
    assert scaler.loss_scale == 8
    assert not fp16_utils.LossScaler(4).has_overflow([param])


def test_small_modules_are_torchs():
    mlp = MLP([4, 8, 2])
    x = batch(0)[0]
    wanted = F.relu(F.linear(F.relu(F.linear(x, mlp.weight_0, mlp.bias_0)), mlp.weight_1, mlp.bias_1))
    assert torch.equal(mlp(x), wanted)
    dense = FusedDense(4, 2)
    two = FusedDenseGeluDense(4, 3, 2)
    for param in (*dense.parameters(), *two.parameters()):
        nn.init.normal_(param)
    assert torch.equal(dense(x), F.linear(x, dense.weight, dense.bias))
    assert two(x).shape == (6, 2)
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 3])
    loss = SoftmaxCrossEntropyLoss.apply(logits, labels, 0.1, 0)
    wanted = F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.1)
    assert torch.equal(loss, torch.cat([torch.zeros(1), wanted[1:]]))
    assert clip_grad_norm_ is nn.utils.clip_grad_norm_
