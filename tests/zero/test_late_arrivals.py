"""Modules and parameters that a model is given after initialize(), in stage 3, against a plain PyTorch loop."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_module_registration_hooks as registration_hooks

import xtrain
from tests import toys
from xtrain.runtime.zero.parameter_offload import ZeROOrderedDict

STEPS = 3


def _tie_in_a_module(model: nn.Module) -> None:
    """A new module that holds a weight which is divided, and one inside it that comes later still."""
    torch.manual_seed(1)
    late = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh())
    late[0].weight = model[0].weight
    model.append(late)
    late.append(nn.Linear(4, 4))
    late[2].weight = model[1].weight
    late[2].bias.requires_grad_(False)


def _tie_a_parameter(model: nn.Module) -> None:
    """A weight that is divided, given to a module without parameters of its own."""
    model[2].tied = model[0].weight


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), toys.MayHaveWeight())


def _inputs(step: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def _engine(model: nn.Module) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    return xtrain.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _train(attach: Callable[[nn.Module], None]) -> dict[str, torch.Tensor]:
    gc.collect()  # what other tests have dropped
    before, model = len(registration_hooks), _model()
    engine = _engine(model)
    assert len(registration_hooks) == before + 1
    attach(model)
    for step in range(STEPS):
        engine.backward(engine(_inputs(step, engine.global_rank)).square().mean())
        engine.step()
        assert not model[0].weight.numel()  # divided again
        assert not model[1].weight.numel()
    assert all(isinstance(m._parameters, ZeROOrderedDict) for m in model.modules() if m._parameters)
    state = engine.module_state_dict()
    engine.destroy()
    assert len(registration_hooks) == before
    return {name: state[name].clone() for name in ("0.weight", "0.bias", "1.weight")}


def _plain(attach: Callable[[nn.Module], None]) -> dict[str, torch.Tensor]:
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (model(_inputs(step, rank)).square().mean() / 2).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def test_weights_may_be_tied_late(ranks: Any) -> None:
    for attach in (_tie_in_a_module, _tie_a_parameter):
        wanted = _plain(attach)
        for state in ranks(2, _train, attach):
            for name, value in state.items():
                torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


def _drop() -> list[int]:
    gc.collect()
    before, model = len(registration_hooks), _model()
    engine = _engine(model)
    during = len(registration_hooks)
    del engine, model
    gc.collect()
    return [during - before, len(registration_hooks) - before]


def test_an_engine_that_is_dropped_leaves_no_hook_in_torch(ranks: Any) -> None:
    assert ranks(2, _drop) == [[1, 0]] * 2
