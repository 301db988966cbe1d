"""`engine.coalesce_grad_reduction()`: one reduction for several backwards, in every stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys
from tests.engine.test_corners import SGD, _engine, _weight
from xtrain.base.errors import ConfigError
from xtrain.comm.ledger import ledger


def _train(stage: int) -> tuple[list[float], list[int], list[float] | None]:
    engine = _engine(toys.Weight(), stage)
    rank, sent, own = engine.grid.rank, [], None
    for step in range(2):
        with engine.coalesce_grad_reduction():
            for index in range(3):
                ledger.reset()
                engine.backward(engine(float(1 + rank + 10 * index + step)))
                sent.append(int(ledger.sent_bytes("reduce_scatter", "all_reduce", "all_to_all", "reduce")))
            grad = xtrain.utils.safe_get_full_grad(engine.module.weight)
            own = None if grad is None else grad.tolist()
        engine.step()
        assert engine.global_steps == step + 1
    return _weight(engine).tolist(), sent, own


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_sum_of_several_backwards_is_reduced_once(ranks: Any, stage: int) -> None:
    # loss = sum(weight * x): the gradient of a step is the sum of x, averaged over the ranks.
    per_rank = [
        [sum(1 + rank + 10 * index + step for index in range(3)) for step in range(2)] for rank in range(2)
    ]
    expected = -sum(sum(steps) for steps in per_rank) / 2
    for rank, (weight, sent, own) in enumerate(ranks(2, _train, stage)):
        assert weight == [expected] * 4
        assert not any(sent)
        assert own == [per_rank[rank][1]] * 4


def _mistakes() -> list[str]:
    engine = _engine(toys.Weight(), 1)
    messages = []

    def fails(action: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            action()
        messages.append(str(caught.value))

    def nested(outer: Any, inner: Any) -> None:
        with outer(), inner():
            pass

    with engine.coalesce_grad_reduction():
        engine.backward(engine(1.0))
        fails(engine.step)
    engine.step()
    fails(lambda: nested(engine.no_sync, engine.coalesce_grad_reduction))
    fails(lambda: nested(engine.coalesce_grad_reduction, engine.no_sync))

    def breaks() -> None:
        with engine.coalesce_grad_reduction():
            engine.backward(engine(100.0))
            raise KeyError

    with pytest.raises(KeyError):
        breaks()
    engine.backward(engine(1.0))  # nothing is left of it
    engine.step()
    messages.append(str(_weight(engine).tolist()))
    aligned = _engine(toys.Weight(), 2, xtrain={"aligned": True})
    fails(lambda: nested(aligned.coalesce_grad_reduction, aligned.no_sync))
    return messages


def test_mistakes_around_it_are_named(ranks: Any) -> None:
    inside, in_no_sync, no_sync, weight, aligned = ranks(2, _mistakes)[0]
    assert "no_sync" in inside
    assert "cannot be nested" in in_no_sync
    assert "reentry" in no_sync
    assert weight == str([-2.0] * 4)
    assert "aligned mode" in aligned


def _bf16(stage: int, coalesced: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    engine = xtrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": SGD,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            **more,
        },
    )[0]
    torch.manual_seed(engine.global_rank)
    inputs = torch.randn(4, 2, 8, dtype=torch.bfloat16)

    def backwards() -> None:
        for number, x in enumerate(inputs):
            engine.set_gradient_accumulation_boundary(number == 3)
            engine.backward(engine(x).float().square().mean())

    if coalesced:
        with engine.coalesce_grad_reduction():
            backwards()
    else:
        backwards()
    engine.step()
    return [xtrain.utils.safe_get_full_fp32_param(param) for param in model.parameters()]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_changes_rounding_only(ranks: Any, stage: int) -> None:
    for mine, plain in zip(ranks(2, _bf16, stage, True)[0], ranks(2, _bf16, stage, False)[0], strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-6)
