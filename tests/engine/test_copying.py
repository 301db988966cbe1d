"""Copies of engines: refused in a sentence, and without an effect on what is built later. Copies of models: right."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import xtrain
from tests import training
from xtrain.base.errors import ConfigError

WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": lambda engine: copy.deepcopy(engine),
    "copy": lambda engine: copy.copy(engine),
    "pickle": lambda engine: pickle.dumps(engine),
    "torch.save": lambda engine: torch.save(engine, io.BytesIO()),
    "AveragedModel": lambda engine: torch.optim.swa_utils.AveragedModel(engine),
    "the optimizer": lambda engine: copy.deepcopy(engine.optimizer),
    "the optimizer, flat": lambda engine: copy.copy(engine.optimizer),
    "the optimizer, pickled": lambda engine: pickle.dumps(engine.optimizer),
    "the scheduler": lambda engine: copy.deepcopy(engine.lr_scheduler),
    "in a list": lambda engine: copy.deepcopy([engine]),
}


def _refused(stage: int) -> tuple[dict[str, str], list[str], list[str]]:
    """What every way says; the curve of an engine built before, and of one built and copied after."""
    before = training.train(training.config(stage, micro=8), 4)
    engine = xtrain.initialize(model=training.build_model(), config=training.config(stage, micro=8))[0]
    told = {}
    for way, function in WAYS.items():
        try:
            function(engine)
        except ConfigError as error:
            told[way] = str(error)
    after = training.train(training.config(stage, micro=8), 4)
    curves = [[loss.hex() for loss in result["losses"]] for result in (before, after)]
    return told, curves[0], curves[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_is_not_copied_and_later_ones_train_as_before(ranks: Any, stage: int) -> None:
    for told, before, after in ranks(2, _refused, stage):
        assert set(told) == set(WAYS)
        assert all("cannot be copied or pickled" in text for text in told.values())
        assert "engine.module_state_dict()" in told["deepcopy"]
        assert "state_dict()" in told["the scheduler"]
        assert before == after


def _copied(stage: int, gathered: bool) -> tuple[bool, bool, bool]:
    engine = xtrain.initialize(model=training.build_model(), config=training.config(stage, micro=8))[0]
    training.engine_step(engine, 0)
    params = list(engine.module.parameters())
    with xtrain.zero.GatheredParameters(params) if gathered else nullcontext():
        twin = copy.deepcopy(engine.module)
    weights = {name: value.clone() for name, value in engine.module_state_dict().items()}
    same = all(torch.equal(value, weights[name]) for name, value in twin.state_dict().items())
    # On one rank only: a copy must not take part in anything collective. And it trains by itself.
    moved = True
    if xtrain.comm.get_rank() == 0:
        optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
        training.loss_of(twin, *training.samples(1)).backward()
        optimizer.step()
        moved = not torch.equal(twin.first.weight, weights["first.weight"])
    xtrain.comm.barrier()
    now = engine.module_state_dict()
    untouched = all(torch.equal(value, weights[name]) for name, value in now.items())
    training.engine_step(engine, 1)
    return same, moved, untouched


@pytest.mark.parametrize(("stage", "gathered"), [(0, False), (1, False), (2, False), (3, True)])
def test_a_copy_of_the_model_is_the_model(ranks: Any, stage: int, gathered: bool) -> None:
    assert ranks(2, _copied, stage, gathered) == [(True, True, True)] * 2


def _divided() -> str:
    engine = xtrain.initialize(model=training.build_model(), config=training.config(3, micro=8))[0]
    try:
        copy.deepcopy(engine.module)
    except ConfigError as error:
        training.engine_step(engine, 0)
        return str(error)
    return ""


def test_a_copy_of_divided_parameters_would_be_empty(ranks: Any) -> None:
    for told in ranks(2, _divided):
        assert "is divided over ranks (ZeRO stage 3)" in told
        assert "GatheredParameters" in told
