"""ZeRO stage 3 whose hooks a library takes off to generate, and puts on again, as TRL does."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

import xtrain
from tests import toys
from tests.zero.test_stage3 import engine_of, ids_of, three_steps
from xtrain.base.errors import ConfigError
from xtrain.zero import GatheredParameters, register_external_parameter

Ranks = Callable[..., list[Any]]


def _take_off(offload: Any) -> None:
    """What libraries do to the object, name for name."""
    external = [param for _, param in offload.module.ds_external_parameters()]
    for param in [*offload.module.parameters(), *external]:
        param.ds_active_sub_modules.clear()
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks = []
    offload.backward_hooks = []


def _put_on(offload: Any) -> None:
    if not offload.param_coordinator.is_invalid_trace():
        offload.param_coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


def _generate_between_steps(kind: str, generate: bool) -> list[float]:
    engine = engine_of(toys.LanguageModel(kind), 3)
    losses = three_steps(engine)
    if generate:
        offload = engine.optimizer.parameter_offload
        inner = len(offload.forward_hooks)
        assert offload.param_coordinator.is_complete_trace()
        with GatheredParameters(engine.parameters()):
            _take_off(offload)
            gc.collect()
            with torch.no_grad():
                for _ in range(1 + 2 * engine.grid.rank):  # each rank as often as it likes
                    engine.module(torch.arange(8).reshape(2, 4) % 16)
            _put_on(offload)
        assert len(offload.forward_hooks) == inner
        assert offload.param_coordinator.is_invalid_trace()
    return losses + three_steps(engine)


@pytest.mark.parametrize("kind", ["tied", "frozen"])
def test_hooks_taken_off_and_put_on(ranks: Ranks, kind: str) -> None:
    assert ranks(2, _generate_between_steps, kind, True) == ranks(2, _generate_between_steps, kind, False)


def _names_of_deepspeed() -> None:
    model = toys.LanguageModel("tied")
    engine = engine_of(model, 3)
    offload = engine.optimizer.parameter_offload
    assert offload.module is model
    assert offload.get_param_coordinator() is offload.param_coordinator
    with pytest.raises(ConfigError, match="the whole model"):
        offload._register_deepspeed_module(model.blocks[0])
    param = next(model.parameters())
    register_external_parameter(model.blocks[0], param)
    assert [found for _, found in model.blocks[0].ds_external_parameters()] == [param]
    with GatheredParameters(model.parameters()):
        other = copy.deepcopy(model)
    ((_, found),) = other.blocks[0].ds_external_parameters()
    assert found is next(other.parameters())
    engine.destroy()
    assert not hasattr(model, "ds_external_parameters")


def test_names_of_deepspeed(ranks: Ranks) -> None:
    ranks(2, _names_of_deepspeed)


def _all_parameters_stay_whole() -> None:
    engine = engine_of(toys.LanguageModel("tied"), 3, persistent=10**6)
    offload = engine.optimizer.parameter_offload
    _take_off(offload)
    _put_on(offload)
    three_steps(engine)


def test_where_nothing_is_divided(ranks: Ranks) -> None:
    ranks(1, _all_parameters_stay_whole)


def _without_optimizer() -> None:
    """As a teacher is, that only answers: DeepSpeed has these names at the optimizer's place then."""
    model = toys.LanguageModel("tied")
    config = {
        "train_batch_size": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, optimizer, _, schedule = xtrain.initialize(model=model, config=config)
    assert engine.optimizer is optimizer
    assert schedule is None
    assert engine.optimizer.module is model
    assert (engine.get_global_grad_norm(), engine.loss_scale(), engine.basic_optimizer) == (None, 1.0, None)
    ids = ids_of(0, 0)
    with torch.no_grad():
        expected = engine(ids)
        with GatheredParameters(engine.parameters()):
            _take_off(engine.optimizer)
            assert torch.equal(engine.module(ids), expected)
            _put_on(engine.optimizer)
        assert torch.equal(engine(ids), expected)
    engine.zero_grad()
    with pytest.raises(ConfigError, match="needs an optimizer"):
        engine.step()


def test_without_optimizer(ranks: Ranks) -> None:
    ranks(1, _without_optimizer)
