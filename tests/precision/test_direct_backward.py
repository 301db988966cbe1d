"""Backward passes that the script runs itself, several of them in a step, and hooks that it adds.

The weight starts at 1 and dL/dw is the input, so that every right value is a sum; those of the table were also read
from deepspeed 0.19.8 (stage 3 there, where outputs do not share their hooks).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from xtrain.base.errors import ConfigError, TrainingError

STAGES = (0, 1, 2, 3)
Named = collections.namedtuple("Named", "first second")


@dataclasses.dataclass(frozen=True)
class Output:
    """What some models return."""

    loss: torch.Tensor
    logits: torch.Tensor


class Kept(dict[str, Any]):
    """A subclass that torch does not know."""


WRAPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda y: y,
    "pair": lambda y: (y, 2 * y),
    "twice": lambda y: (y, y),
    "dependent": lambda y: (y.mean(), y),
    "nested": lambda y: {"a": y, "b": [2 * y, (None, 3)]},
    "named": lambda y: Named(y, 2 * y),
    "dataclass": lambda y: Output(y.mean(), y),
    "subclass": lambda y: Kept(a=y),
    "view": lambda y: y.view(1, -1),
}
"""Ways to return y."""


def _loss(kind: str, out: Any) -> torch.Tensor:
    if kind in ("pair", "twice", "named"):
        return (out[0] + out[1]).mean()
    if kind == "dependent":
        return out[0]
    if kind == "nested":
        return (out["a"] + out["b"][0]).mean()
    if kind == "dataclass":
        return out.loss
    if kind == "subclass":
        return out["a"].mean()
    if kind == "view":
        out += 1  # the history of a view is written anew
        return out.mean()
    return out.mean()


FACTOR = {"pair": 3, "twice": 2, "nested": 3, "named": 3}
"""Times the gradient of one output; 1 for the others."""


def _engine(model: nn.Module, stage: int, accumulation: int = 1, **more: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "zero_optimization": training.zero(stage, 0),
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        **more,
    }
    return xtrain.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def _weight(engine: Any) -> float:
    return float(engine.module_state_dict()["weight"].float())


def _backward(engine: Any, how: str, loss: torch.Tensor) -> None:
    if how == "engine":
        engine.backward(loss)
    else:
        (engine.scale(loss) if how == "scale" else loss).backward()


def _accumulated(stage: int, how: str) -> dict[str, float]:
    result = {}
    for kind, wrap in WRAPS.items():
        engine = _engine(toys.Scaled(wrap), stage, accumulation=4)
        for _ in range(4):
            _backward(engine, how, _loss(kind, engine(torch.ones(1))))
            engine.step()
        result[kind] = _weight(engine)
    return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["engine", "direct", "scale"])
def test_accumulation_divides_once(ranks: Any, stage: int, how: str) -> None:
    for seen in ranks(2, _accumulated, stage, how):
        assert seen == {kind: 1.0 - FACTOR.get(kind, 1) for kind in seen}


def _several_losses(stage: int) -> list[float]:
    """Two backward passes through one forward, and two forwards in one loss; the window's sum is 4 in both."""
    result = []
    for both in (False, True):
        engine = _engine(toys.Scaled(), stage, accumulation=2)
        for _ in range(2):
            out = engine(torch.ones(1))
            if both:
                (out + 3 * engine(torch.ones(1))).mean().backward()
            else:
                out.mean().backward(retain_graph=True)
                (3 * out).mean().backward()
            engine.step()
        result.append(_weight(engine))
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_several_losses(ranks: Any, stage: int) -> None:
    assert ranks(2, _several_losses, stage) == [[-3.0, -3.0]] * 2


def _own_boundaries(stage: int) -> list[float]:
    """no_sync (below stage 2) and a boundary set by hand: both divide as ever."""
    result = []
    for by_hand in (True, False):
        if stage >= 2 and not by_hand:
            continue
        engine = _engine(toys.Scaled(), stage, accumulation=2)
        if by_hand:
            for boundary in (False, False, True):
                engine.set_gradient_accumulation_boundary(boundary)
                engine(torch.ones(1)).mean().backward()
            engine.step()
        else:
            with engine.no_sync():
                engine(torch.ones(1)).mean().backward()
            for _ in range(2):
                engine(torch.ones(1)).mean().backward()
                engine.step()
        result.append(_weight(engine))
    return result


@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_and_boundaries_by_hand(ranks: Any, stage: int) -> None:
    for seen in ranks(2, _own_boundaries, stage):
        assert seen == [-0.5] * len(seen)


def _not_by_the_engine(stage: int) -> float:
    """What does not come from the engine's outputs is not divided, as in DeepSpeed."""
    model = toys.Scaled()
    engine = _engine(model, stage, accumulation=4)
    for _ in range(4):
        (engine(torch.ones(1)).mean() + model.weight.sum()).backward()
        engine.step()
    return _weight(engine)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_penalty_on_parameters_is_not_divided(ranks: Any, stage: int) -> None:
    assert ranks(2, _not_by_the_engine, stage) == [-4.0] * 2


def _identity() -> tuple[bool, bool, bool]:
    """Outputs are handed on as they are where nothing is to be divided."""
    same = []
    for accumulation, grads in ((1, True), (4, False), (4, True)):
        model = toys.Scaled(WRAPS["nested"])
        kept: list[Any] = []
        engine = _engine(model, 0, accumulation=accumulation)
        model.register_forward_hook(lambda *args, kept=kept: kept.append(args[-1]))
        with torch.set_grad_enabled(grads):
            same.append(engine(torch.ones(1)) is kept[0])
    return same[0], same[1], same[2]


def test_outputs_are_replaced_only_where_needed(ranks: Any) -> None:
    assert ranks(1, _identity) == [(True, True, False)]


# ---------------------------------------------------------------- loss scale


def _fp16(stage: int, how: str, scale: float) -> tuple[float, str]:
    fp16 = {"enabled": True, "loss_scale": scale, "initial_scale_power": 12}
    engine = _engine(toys.Scaled(), stage, fp16=fp16)
    said = ""
    try:
        _backward(engine, how, engine(torch.ones(1, dtype=torch.float16)).mean())
        engine.step()
    except TrainingError as error:
        said = str(error)
        _backward(engine, "engine", engine(torch.ones(1, dtype=torch.float16)).mean())
        engine.step()  # nothing is left of what was refused
    return _weight(engine), said


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scale", [0, 4096.0])
@pytest.mark.parametrize("how", ["engine", "direct", "scale"])
def test_a_loss_scale_that_was_not_applied_is_an_error(
    ranks: Any, stage: int, how: str, scale: float
) -> None:
    for weight, said in ranks(2, _fp16, stage, how, scale):
        assert weight == 0.0
        assert ("Loss scaling is required" in said) == (how == "direct")


def _another_engine() -> tuple[str, float, float]:
    """One loss over two engines: right while their scales are the same, an error when they differ."""
    fp16: dict[str, Any] = {"enabled": True, "initial_scale_power": 4}
    first, second = (_engine(toys.Scaled(), 1, fp16=fp16) for _ in range(2))
    x = torch.ones(1, dtype=torch.float16)
    first.backward((first(x) + second(x)).mean())
    first.step()
    second.step()
    weights = _weight(first), _weight(second)
    second.optimizer.loss_scaler.value = 8.0
    try:
        first.backward((first(x) + second(x)).mean())
        return "no error", *weights
    except TrainingError as error:
        return str(error), *weights


def test_two_engines_with_different_scales(ranks: Any) -> None:
    for said, *weights in ranks(2, _another_engine):
        assert weights == [0.0, 0.0]
        assert "Loss scaling is required" in said


def _scale_arguments() -> list[str]:
    engine = _engine(toys.Scaled(), 0)
    said = []
    for wrong in (torch.ones(2, requires_grad=True) * 2, torch.ones(()), 1.0):
        with pytest.raises(ConfigError) as caught:
            engine.scale(wrong)
        said.append(str(caught.value))
    return said


def test_scale_takes_a_loss(ranks: Any) -> None:
    assert all("scalar" in said for said in ranks(1, _scale_arguments)[0])


# ---------------------------------------------------------------- two backward passes, one step


def _two_backwards(stage: int, aligned: bool, accumulation: int) -> tuple[float, float]:
    engine = _engine(toys.Scaled(), stage, accumulation=accumulation, xtrain={"aligned": aligned})
    for _ in range(accumulation):
        engine.backward(engine(torch.ones(1)).mean())
        engine.backward(engine(torch.full((1,), 2.0 + engine.global_rank)).mean())  # 2 and 3 on two ranks
        engine.step()
    return _weight(engine), engine.get_global_grad_norm()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_backwards_before_a_step(ranks: Any, stage: int, aligned: bool, accumulation: int) -> None:
    """As a GAN's discriminator does: the gradients add up."""
    for seen in ranks(2, _two_backwards, stage, aligned, accumulation):
        assert seen == (1.0 - 3.5, 3.5)


def _given_up(stage: int) -> float:
    """zero_grad between the two: only the second counts."""
    engine = _engine(toys.Scaled(), stage)
    engine.backward(engine(torch.ones(1)).mean())
    engine.zero_grad()
    engine.backward(engine(torch.full((1,), 2.0)).mean())
    engine.step()
    return _weight(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_of_two_can_be_discarded(ranks: Any, stage: int) -> None:
    assert ranks(2, _given_up, stage) == [-1.0, -1.0]


# ---------------------------------------------------------------- hooks of the script


def _hooked(stage: int, kind: str) -> float:
    model = toys.Scaled()
    engine = _engine(model, stage, accumulation=2)

    def in_place(param: torch.Tensor) -> None:
        assert param.grad is not None
        param.grad.mul_(2)

    def replace(param: torch.Tensor) -> None:
        assert param.grad is not None
        param.grad = param.grad * 2

    if kind == "gradient":
        model.weight.register_hook(lambda grad: grad * 2)
    else:
        model.weight.register_post_accumulate_grad_hook(in_place if kind == "in place" else replace)
    for _ in range(2):
        engine.backward(engine(torch.ones(1)).mean())
        engine.step()
    return _weight(engine)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["gradient", "in place", "replace"])
def test_hooks_registered_after_initialize(ranks: Any, stage: int, kind: str) -> None:
    """Below stage 2 a hook after accumulation sees the sum so far, as in PyTorch: (0.5 * 2 + 0.5) * 2. From stage 2 on
    it sees the micro-batch's own gradient, as in DeepSpeed."""
    right = 1.0 - (3.0 if kind != "gradient" and stage < 2 else 2.0)
    assert ranks(2, _hooked, stage, kind) == [right, right]
