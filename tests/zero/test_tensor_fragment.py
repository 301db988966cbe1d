"""Gradients, masters and optimizer states by parameter, against a plain PyTorch loop in float64 and real DeepSpeed."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import training
from tests.live_deepspeed import live_deepspeed
from xtrain import utils
from xtrain.base.errors import ConfigError
from xtrain.zero.home import whole
from xtrain.zero.owners import owner_of, register

STEPS = 3


def _config(stage: int, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    settings = training.config(
        stage,
        4,
        bf16=dtype == "bf16",
        gradient_clipping=0.0,
        fp16={"enabled": dtype == "fp16", "loss_scale": 64},
        **more,
    )
    del settings["scheduler"]
    return settings


def _value(param: nn.Parameter) -> torch.Tensor:
    """The parameter's own data, gathered where stage 3 has divided it."""
    with whole(param) as data:
        return data.detach().clone()


def _backward_window(engine: Any, step: int, own: bool = False) -> None:
    """Everything of a window but the last `step()`."""
    x, y = training.samples(step)
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    rank, last = xtrain.comm.get_rank(), accumulation - 1
    for index in range(accumulation):
        first = (rank * accumulation + index) * micro
        loss = training.loss_of(engine, x[first : first + micro], y[first : first + micro])
        if own:
            engine.scale(loss).backward()
        else:
            engine.backward(loss)
        if index < last:
            engine.step()


def _watch(stage: int, dtype: str, own: bool) -> list[dict[str, dict[str, torch.Tensor]]]:
    """What the getters say in each of the steps, gradients before and the rest after the update."""
    model = training.build_model()
    engine, *_ = xtrain.initialize(
        model=model, model_parameters=model.parameters(), config=_config(stage, dtype)
    )
    seen = []
    for step in range(STEPS):
        _backward_window(engine, step, own)
        grads = {name: utils.safe_get_full_grad(p) for name, p in model.named_parameters()}
        engine.step()
        assert all(utils.safe_get_full_grad(p) is None for p in model.parameters())
        seen.append(
            {
                name: {
                    "grad": grads[name],
                    "weight": utils.safe_get_full_fp32_param(p),
                    "exp_avg": utils.safe_get_full_optimizer_state(p, "exp_avg"),
                    "exp_avg_sq": utils.safe_get_full_optimizer_state(p, "exp_avg_sq"),
                    "param": _value(p),
                }
                for name, p in model.named_parameters()
            }
        )
    return seen


def _expected() -> list[dict[str, dict[str, torch.Tensor]]]:
    model = training.build_model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    seen = []
    for step in range(STEPS):
        optimizer.zero_grad()
        training.loss_of(model, *training.samples(step)).backward()
        optimizer.step()
        seen.append(
            {
                name: {
                    "grad": p.grad.clone(),
                    "weight": p.detach().clone(),
                    **{key: optimizer.state[p][key].clone() for key in ("exp_avg", "exp_avg_sq")},
                }
                for name, p in model.named_parameters()
            }
        )
    return seen


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "own"), [("fp32", False), ("fp32", True), ("bf16", False), ("fp16", False)]
)
def test_getters_against_pytorch(ranks: Any, stage: int, dtype: str, own: bool) -> None:
    scale, loose = (64.0 if dtype == "fp16" else 1.0), dtype != "fp32"
    for result in ranks(2, _watch, stage, dtype, own):
        for ours, theirs in zip(result, _expected(), strict=True):
            for name, values in theirs.items():
                for kind, value in values.items():
                    found = ours[name][kind].double() / (scale if kind == "grad" else 1.0)
                    assert ours[name][kind].dtype == torch.float32
                    tolerance = {"rtol": 0.2, "atol": 2e-2} if loose else {"rtol": 1e-4, "atol": 1e-6}
                    torch.testing.assert_close(found, value, **tolerance)
                # The parameter is the rounded master.
                assert torch.equal(ours[name]["weight"].to(ours[name]["param"].dtype), ours[name]["param"])


def _set(stage: int, dtype: str, local: bool) -> None:
    model = training.build_model()
    engine, *_ = xtrain.initialize(
        model=model, model_parameters=model.parameters(), config=_config(stage, dtype)
    )
    _backward_window(engine, 0)
    engine.step()
    generator = torch.Generator().manual_seed(5)
    for p in model.parameters():
        shape = _value(p).shape
        wanted = {
            key: torch.rand(shape, generator=generator) for key in ("weight", "grad", "exp_avg", "exp_avg_sq")
        }
        if local:
            cut = utils.safe_get_local_fp32_param(p).numel()
            full = utils.safe_get_full_fp32_param(p)
            assert cut <= full.numel()
            utils.safe_set_local_fp32_param(p, torch.full((cut,), 0.3))
            utils.safe_set_local_optimizer_state(p, torch.full((cut,), 0.4), "exp_avg")
            assert torch.equal(utils.safe_get_local_optimizer_state(p, "exp_avg"), torch.full((cut,), 0.4))
            wanted["weight"], wanted["exp_avg"] = torch.full(shape, 0.3), torch.full(shape, 0.4)
        else:
            utils.safe_set_full_fp32_param(p, wanted["weight"])
            utils.safe_set_full_optimizer_state(p, wanted["exp_avg"], "exp_avg")
        utils.safe_set_full_optimizer_state(p, wanted["exp_avg_sq"], "exp_avg_sq")
        assert torch.equal(utils.safe_get_full_fp32_param(p), wanted["weight"])  # not rounded
        assert torch.equal(_value(p), wanted["weight"].to(p.dtype))
        assert torch.equal(utils.safe_get_full_optimizer_state(p, "exp_avg"), wanted["exp_avg"])
        p.wanted = wanted
    _backward_window(engine, 1)
    for p in model.parameters():
        wanted = p.wanted
        if local:
            utils.safe_set_local_grad(p, torch.full((utils.safe_get_local_grad(p).numel(),), 0.25))
            wanted["grad"] = torch.full(p.wanted["weight"].shape, 0.25)
        else:
            utils.safe_update_full_grad_vectorized([p], lambda grad, q: q.wanted["grad"] + 0 * grad)
        found = utils.safe_get_full_grad(p)
        torch.testing.assert_close(found, wanted["grad"], rtol=0 if dtype == "fp32" else 4e-3, atol=0)
        wanted["grad"] = found  # in the dtype of gradients
    engine.step()
    for p in model.parameters():
        # Adam's second step from the values that were set.
        wanted = p.wanted
        grad = wanted["grad"] / engine.loss_scale()
        m = 0.9 * wanted["exp_avg"] + 0.1 * grad
        v = 0.95 * wanted["exp_avg_sq"] + 0.05 * grad**2
        expected = wanted["weight"] - 0.01 * (m / (1 - 0.9**2)) / ((v / (1 - 0.95**2)).sqrt() + 1e-8)
        torch.testing.assert_close(utils.safe_get_full_fp32_param(p), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(_value(p), utils.safe_get_full_fp32_param(p).to(p.dtype))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("local", [False, True])
def test_setters_take_effect_in_the_next_step(ranks: Any, stage: int, dtype: str, local: bool) -> None:
    ranks(2, _set, stage, dtype, local)


def _odd_cases() -> dict[str, Any]:
    model = training.build_model()
    model.first.bias.requires_grad_(False)
    engine, *_ = xtrain.initialize(model=model, model_parameters=model.parameters(), config=_config(1))
    frozen, weight = model.first.bias, model.second.weight
    before = frozen.detach().clone()
    utils.safe_set_full_fp32_param(frozen, torch.ones_like(frozen))
    seen: dict[str, Any] = {
        "frozen": [
            utils.safe_get_full_fp32_param(frozen),
            utils.safe_get_full_grad(frozen),
            utils.safe_get_full_optimizer_state(frozen, "exp_avg"),
            utils.safe_get_local_grad(frozen),
        ],
        "unchanged": torch.equal(frozen.detach(), before),
        "stranger": utils.safe_get_full_fp32_param(nn.Parameter(torch.ones(2))),
        "too early": utils.safe_get_full_grad(weight),
    }
    for what, action in {
        "no state": lambda: utils.safe_get_full_optimizer_state(weight, "exp_avg"),
        "no grad": lambda: utils.safe_set_full_grad(weight, torch.ones_like(weight)),
        "no local grad": lambda: utils.safe_set_local_grad(weight, torch.ones(3)),
        "wrong shape": lambda: utils.safe_set_full_fp32_param(weight, torch.ones(3)),
        "wrong run": lambda: utils.safe_set_local_fp32_param(weight, torch.ones(1000)),
    }.items():
        with pytest.raises(ConfigError) as caught:
            action()
        seen[what] = str(caught.value)
    x, y = (t[:4] for t in training.samples(0))
    engine.backward(
        training.loss_of(engine, x, y)
    )  # the first of two micro-batches: this rank's own gradient
    seen["own"] = torch.equal(utils.safe_get_full_grad(weight), weight.grad)
    engine.step()
    engine.backward(training.loss_of(engine, x, y))
    engine.step()
    with pytest.raises(ConfigError) as caught:
        utils.safe_get_full_optimizer_state(weight, "step")
    seen["scalar"] = str(caught.value)
    del engine
    return seen


def test_frozen_parameters_and_mistakes(ranks: Any) -> None:
    for seen in ranks(2, _odd_cases):
        assert seen["frozen"] == [None] * 4
        assert seen["unchanged"]
        assert seen["stranger"] is None
        assert seen["too early"] is None
        assert seen["own"]
        assert "none before the first step" in seen["no state"]
        assert "between the last backward" in seen["no grad"]
        assert "between the last backward" in seen["no local grad"]
        assert "'second.weight' of shape (5, 33)" in seen["wrong shape"]
        assert "'second.weight'" in seen["wrong run"]
        assert "it has exp_avg, exp_avg_sq" in seen["scalar"]


def _wide(stage: int) -> bool:
    """float64 stays float64, and a value survives the sum over ranks to the bit."""
    model = training.build_model().double()
    engine, *_ = xtrain.initialize(model=model, model_parameters=model.parameters(), config=_config(stage))
    value = torch.full((33, 7), 1 / 3, dtype=torch.float64)
    utils.safe_set_full_fp32_param(model.first.weight, value)
    found = utils.safe_get_full_fp32_param(model.first.weight)
    del engine
    return found.dtype == torch.float64 and torch.equal(found, value)


def test_float64_is_not_narrowed(ranks: Any) -> None:
    for stage in (0, 1, 2, 3):
        assert ranks(4, _wide, stage) == [True] * 4


def _both(stage: int, bf16: bool) -> list[dict[str, torch.Tensor]]:
    """The getters of DeepSpeed and ours, each on its own engine, after setting a state and a weight."""
    config = {
        "train_batch_size": training.GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    }
    rank, found = xtrain.comm.get_rank(), []
    with live_deepspeed() as deepspeed:
        for framework in (deepspeed, xtrain):
            model = training.build_model()
            engine, *_ = framework.initialize(model=model, model_parameters=model.parameters(), config=config)
            functions, seen = framework.utils, {}
            for step in range(3):
                x, y = (t[rank * 8 : rank * 8 + 8] for t in training.samples(step))
                engine.backward(training.loss_of(engine, x, y))
                if step == 2:
                    for name, p in model.named_parameters():
                        seen[f"grad {name}"] = functions.safe_get_full_grad(p).float()
                engine.step()
                if step == 1:
                    weight = model.first.weight
                    functions.safe_set_full_fp32_param(weight, torch.full(weight.shape, 0.1))
                    functions.safe_set_full_optimizer_state(weight, torch.full(weight.shape, 1e-3), "exp_avg")
                    if framework is deepspeed:
                        # It sets the master only; without this its third step would see the old weights.
                        weight.data.fill_(0.1)
            for name, p in model.named_parameters():
                seen[f"weight {name}"] = functions.safe_get_full_fp32_param(p)
                for key in ("exp_avg", "exp_avg_sq"):
                    seen[f"{key} {name}"] = functions.safe_get_full_optimizer_state(p, key)
            engine.destroy()
            found.append({key: value.detach().clone() for key, value in seen.items()})
    return found


@pytest.mark.deepspeed
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_against_deepspeed(ranks: Any, stage: int, bf16: bool) -> None:
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    tolerance = {"rtol": 5e-2, "atol": 5e-3} if bf16 else {"rtol": 1e-4, "atol": 1e-6}
    for theirs, ours in ranks(2, _both, stage, bf16):
        assert theirs.keys() == ours.keys()
        for key, value in theirs.items():
            assert ours[key].dtype == torch.float32
            torch.testing.assert_close(
                ours[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )


class _Holder:
    """As much of a ZeroOptimizer as the registry looks at."""

    def __init__(self, param: nn.Parameter) -> None:
        group = SimpleNamespace(members=[param], names=["weight"], shapes=[param.shape])
        self.gradients = [SimpleNamespace(group=group)]


def test_the_registry_keeps_nothing_alive() -> None:
    param = nn.Parameter(torch.ones(2))
    holder = _Holder(param)
    register(holder)  # type: ignore[arg-type]
    found = owner_of(param)
    assert found is not None
    assert found.name == "weight"
    del found, holder
    assert owner_of(param) is None
    gone = weakref.ref(param)
    del param
    assert gone() is None
