"""Losses that are not finite and gradients that are missing: the same outcome on every rank, never a hang."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from tests.engine.test_corners import _engine
from xtrain.base.errors import ConfigError, TrainingError


def _losses(how: str, stage: int, more: dict[str, Any]) -> tuple[str, list[float], int, int]:
    model = toys.Offset()
    engine = _engine(model, stage, **more)
    rank = engine.grid.rank
    said = ""
    for step in range(4):
        bad = step == 1 and rank == 1
        value = (float("nan") if bad else 1.0, 0.0) if how == "gradient" else (1.0, math.inf if bad else 0.0)
        try:
            if how == "own backward":
                engine.scale(engine(float("inf") if bad else 1.0)).backward()
            else:
                engine.backward(engine(*value))
            engine.step()
        except TrainingError as error:
            said = str(error)
    return said, model.weight.tolist(), engine.skipped_steps, engine.global_steps


@pytest.mark.parametrize("how", ["gradient", "loss", "own backward"])
@pytest.mark.parametrize(
    ("stage", "more", "raises"),
    [
        (0, {}, True),
        (1, {}, False),
        (2, {}, False),
        (0, {"bf16": {"enabled": True}}, False),
        (0, {"bf16": {"enabled": True, "check_grad_overflow": False}}, False),
        (1, {"fp16": {"enabled": True, "loss_scale": 8}}, False),
        (2, {"fp16": {"enabled": True, "initial_scale_power": 4}}, False),
    ],
)
def test_a_bad_loss_on_one_rank(ranks: Any, how: str, stage: int, more: dict[str, Any], raises: bool) -> None:
    """Where DeepSpeed would train on with NaN weights it is an error; else the step is skipped, as there."""
    first, second = ranks(2, _losses, how, stage, more)
    assert first == second
    said, weights, skipped, steps = first
    assert (skipped, steps) == (1, 4)
    assert weights == [-3.0] * 4  # the three good steps, and nothing else
    assert bool(said) == raises
    if raises:
        assert said.startswith("step 2: the gradient norm is ")
        kind = {"gradient": "the loss was nan on rank 1", "loss": "the loss was inf on rank 1"}
        assert kind.get(how, "the script ran backward by itself") in said
        assert "\n" not in said


def _unchecked(stage: int, bad: float) -> tuple[list[float], int, float]:
    """The first of two steps has one gradient that is not finite."""
    bf16 = {"enabled": True, "check_grad_overflow": False}
    engine = _engine(toys.Offset(), stage, gradient_clipping=1.0, bf16=bf16)
    for step in range(2):
        x = torch.ones(4, dtype=torch.bfloat16)
        x[0] = 1.0 if step else bad
        engine.backward(engine(x))
        engine.step()
    return (
        engine.module_state_dict()["weight"].float().tolist(),
        engine.skipped_steps,
        float(engine.get_global_grad_norm()),
    )


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_without_the_check(ranks: Any, stage: int, bad: float) -> None:
    """As in deepspeed 0.19.8: stages 1 and 2 go on, clipping leaves finite gradients at zero; 0 and 3 skip the step."""
    for weights, skipped, norm in ranks(2, _unchecked, stage, bad):
        assert weights[1:] == [-0.5] * 3
        assert norm == 2.0
        assert (skipped, math.isnan(weights[0])) == ((0, True) if stage in (1, 2) else (1, False))


def _in_a_row(precision: dict[str, Any], limit: int, accumulation: int) -> tuple[str, int]:
    engine = _engine(toys.Offset(), 1, accumulation, xtrain={"max_skipped_steps": limit}, **precision)
    for step in range(12):
        for index in range(accumulation):
            good = step < 2 or step == 3
            bad = not good and index == accumulation - 1 and engine.grid.rank == 0
            engine.backward(engine(1.0, float("nan") if bad else 0.0))
            try:
                engine.step()
            except TrainingError as error:
                return str(error), step
    return "", 12


@pytest.mark.parametrize("accumulation", [1, 3])
def test_too_many_skipped_steps_in_a_row_end_the_run(ranks: Any, accumulation: int) -> None:
    for said, step in ranks(2, _in_a_row, {"bf16": {"enabled": True}}, 3, accumulation):
        assert step == 6  # steps 4, 5 and 6; step 2 stood alone
        assert "step 7" in said
        assert "for 3 steps in a row" in said
        assert f"the loss was nan on rank 0 (micro-batch {accumulation} of {accumulation})" in said
    assert ranks(2, _in_a_row, {"bf16": {"enabled": True}}, 0, 1) == [("", 12)] * 2


def test_the_smallest_loss_scale_is_the_limit_of_a_dynamic_one(ranks: Any) -> None:
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 2, "hysteresis": 1}}
    for said, step in ranks(2, _in_a_row, fp16, 2, 1):
        assert step == 5  # 4 -> 2 (step 2), -> 1 (step 4), and no further
        assert said.startswith("step 6: gradients overflow at the smallest loss scale (1)")
        assert "the loss was nan on rank 0" in said


def _branches(stage: int, by_rank: tuple[str, str], check: bool) -> str:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.left, self.right = (nn.Parameter(torch.ones(2)) for _ in range(3))

        def forward(self, which: str) -> torch.Tensor:
            return (self.always * getattr(self, which)).sum()

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "ignore_unused_parameters": not check},
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
    }
    engine = xtrain.initialize(model=Branches(), config=settings)[0]
    engine.backward(engine(by_rank[engine.grid.rank]))
    try:
        engine.step()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_gradient_that_is_missing_on_one_rank_is_named_on_every_rank(ranks: Any, stage: int) -> None:
    first, second = ranks(2, _branches, stage, ("left", "right"), True)
    assert first == second
    assert "'right' on rank 0" in first
    assert "'left' on rank 1" in first
    first, second = ranks(2, _branches, stage, ("left", "left"), True)
    assert first == second
    assert "'right' on every rank" in first
    assert ranks(2, _branches, stage, ("left", "right"), False) == ["", ""]


def test_every_gradient_is_there(ranks: Any) -> None:
    settings = training.config(1)
    settings["zero_optimization"]["ignore_unused_parameters"] = False
    checked = ranks(2, training.train, settings, 3)[0]["losses"]
    assert checked == ranks(2, training.train, training.config(1), 3)[0]["losses"]
