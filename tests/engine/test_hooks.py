"""Who watches an engine registers at its hooks: called in order, told of errors, released by destroy()."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import toys
from xtrain.align.record import read_record
from xtrain.align.recorder import Recorder
from xtrain.base.errors import CheckpointError
from xtrain.engine.hooks import Hooks
from xtrain.zero.train_state import TrainState

ALL = [field.name for field in fields(Hooks)]


def _engine(stage: int = 2, **more: Any) -> Any:
    torch.manual_seed(0)
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, **more}
    return xtrain.initialize(
        model=toys.TwoLayers(),
        config={
            **config,
            "optimizer": {"type": "Adam", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": stage},
        },
    )[0]


def _watch(engine: Any) -> list[str]:
    """Note every call from now on."""
    seen: list[str] = []
    for name in ALL:

        def note(state: TrainState, *rest: Any, name: str = name) -> None:
            assert isinstance(state, TrainState)
            assert state is engine.train_state
            told = [value for value in rest if isinstance(value, bool)]
            seen.append(" ".join([name, *map(str, told)]))

        getattr(engine.train_hooks, name).append(note)
    return seen


def _micro_batch(engine: Any) -> None:
    engine.backward(engine(torch.ones(4, toys.FEATURES)).square().mean())
    engine.step()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_they_are_called_in_order(ranks: Any, stage: int) -> None:
    ranks(1, _order, stage)


def _order(stage: int) -> None:
    engine = _engine(stage)
    seen = _watch(engine)
    _micro_batch(engine)
    passes = ["before_forward", "after_forward", "before_backward", "after_differentiation", "after_backward"]
    assert seen == [*passes, "before_step False", "after_step False"]
    seen.clear()
    _micro_batch(engine)
    assert seen == [*passes, "before_step True", "before_update", "after_step True", "after_update"]
    engine.destroy()


def test_errors_discards_and_loads_are_told(ranks: Any, tmp_path: Path) -> None:
    ranks(1, _told, tmp_path)


def _told(folder: Path) -> None:
    engine = _engine()
    seen = _watch(engine)
    with pytest.raises(RuntimeError):
        engine(torch.ones(4, 999))
    assert seen == ["before_forward", "on_error"]
    seen.clear()
    engine.zero_grad()
    assert seen == ["on_discard"]
    engine.save_checkpoint(str(folder), tag="a")
    seen.clear()
    engine.load_checkpoint(str(folder), tag="a")
    assert seen == ["on_discard", "on_load"]
    seen.clear()
    with pytest.raises(CheckpointError):
        engine.load_checkpoint(str(folder), tag="b")
    assert seen == ["on_load"]
    engine.destroy()


def test_before_forward_may_replace_what_the_model_gets(ranks: Any) -> None:
    ranks(1, _replaced)


def _replaced() -> None:
    engine = _engine()
    engine.eval()
    x = torch.ones(4, toys.FEATURES)
    expected = engine(2 * x)
    engine.train_hooks.before_forward.append(lambda state, args, kwargs: ((2 * args[0],), kwargs))
    assert torch.equal(engine(x), expected)
    engine.destroy()


def test_destroy_releases_everybody(ranks: Any) -> None:
    ranks(1, _released)


def _released() -> None:
    engine = _engine(xtrain={"sdc_check": {}}, wall_clock_breakdown=True)
    seen = _watch(engine)
    engine.destroy()
    assert seen == ["on_destroy"]
    assert not any(getattr(engine.train_hooks, name) for name in ALL)


def test_a_loss_that_was_given_up_is_not_recorded(ranks: Any, tmp_path: Path) -> None:
    """zero_grad() in the middle of a window begins it anew: the record has the losses that were trained on."""
    ranks(1, _given_up, tmp_path)


def _given_up(folder: Path) -> None:
    engine = _engine(gradient_accumulation_steps=1)
    Recorder(folder / "r.jsonl").attach(engine)
    x = torch.ones(4, toys.FEATURES)
    engine.backward(engine(1000 * x).square().mean())
    engine.zero_grad()
    loss = engine(x).square().mean()
    engine.backward(loss)
    engine.step()
    assert read_record(folder / "r.jsonl").losses() == {1: loss.item()}
    engine.destroy()
