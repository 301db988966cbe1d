"""ZeRO stage 3 with torch.compile and torch.func, and reading many parameters one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys
from tests.zero.test_stage3 import engine_of, three_steps
from tests.zero.test_stage3_corners import _build, _engine, _inputs, _train_and_compare
from xtrain.base.errors import ConfigError
from xtrain.zero import GatheredParameters

Ranks = Callable[..., list[Any]]

# ---------------------------------------------------------------- torch.compile


def _compiled(kind: str, what: str, stage: int) -> list[float]:
    torch._dynamo.reset()
    model: Any = toys.LanguageModel(kind)
    if what == "model":
        model = torch.compile(model, backend="aot_eager")
    if what == "blocks":
        for number, block in enumerate(model.blocks):
            model.blocks[number] = torch.compile(block, backend="aot_eager")
    engine = engine_of(model, stage)
    return three_steps(engine)


@pytest.mark.parametrize("kind", ["tied", "frozen", "shared", "outside", "inside", "functional", "direct"])
@pytest.mark.parametrize("what", ["model", "blocks"])
def test_what_was_compiled_before_initialize(ranks: Ranks, kind: str, what: str) -> None:
    assert ranks(2, _compiled, kind, what, 3) == ranks(2, _compiled, kind, "", 0)


# ---------------------------------------------------------------- torch.func


def _with_own_parameters(model: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.func.functional_call(module, dict(module.named_parameters()), x).square().mean()


def _with_doubled_parameters(_: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with GatheredParameters(list(module.parameters())):
        doubled = {name: 2 * param for name, param in module.named_parameters()}
        return torch.func.functional_call(module, doubled, x).square().mean()


@pytest.mark.parametrize("loss", [_with_own_parameters, _with_doubled_parameters])
def test_functional_call(ranks: Ranks, loss: Any) -> None:
    ranks(2, _train_and_compare, _build, loss)


def _doubled_outside() -> str:
    engine = _engine(_build())
    module = engine.module
    x = _inputs(0, engine.grid.rank)
    before = dict(module.named_parameters())
    doubled = {name: 2 * param for name, param in before.items()}
    with pytest.raises(ConfigError) as caught:
        torch.func.functional_call(module, doubled, x)
    assert all(param is before[name] for name, param in module.named_parameters())
    return str(caught.value)


def test_functional_call_of_what_was_made_from_nothing(ranks: Ranks) -> None:
    for said in ranks(2, _doubled_outside):
        assert "was replaced by an empty tensor" in said
        assert "GatheredParameters" in said


# ---------------------------------------------------------------- many parameters, one by one

COUNT = 300


def _read_one_by_one(detached: bool) -> tuple[float, int]:
    """(bytes this rank sent, calls) for reading every parameter alone."""
    model = toys.Many(COUNT)
    engine = engine_of(nn.Sequential(model))
    assert len(engine.partition.gatherer.param_groups) <= 2
    if detached:
        engine.destroy()
    xtrain.comm.ledger.reset()
    for number, param in enumerate(model.small):
        with GatheredParameters(param):
            assert torch.equal(param.detach(), torch.full((8,), float(number)))
            assert model.small[(number + 1) % COUNT].numel() == 0
        assert param.numel() == 0
    with GatheredParameters(model.large):
        assert torch.equal(model.large.detach(), torch.arange(10_000.0))
    ledger = xtrain.comm.ledger
    return float(ledger.sent_bytes()), sum(entry.calls for entry in ledger.entries.values())


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_reading_parameters_one_by_one_moves_each_once(ranks: Ranks, count: int, detached: bool) -> None:
    """It used to gather the whole group for each: COUNT times as many bytes."""
    for sent, calls in ranks(count, _read_one_by_one, detached):
        data = (COUNT * 8 + count * 10_000) * 4 * (count - 1) / count
        assert sent <= data + 2 * COUNT * 8 * (count - 1)
        assert calls <= 2 * (COUNT + 1)


def _changed_one_by_one() -> None:
    """Alone, a few together, all, and one inside another: values come from the modifier and reach the masters."""
    model = toys.Many(COUNT)
    engine = engine_of(nn.Sequential(model), optimizer={"type": "AdamW", "params": {"lr": 0.0}})
    for number, some in enumerate(
        ([model.small[3]], list(model.small)[5:9], [model.large], list(model.parameters()))
    ):
        with GatheredParameters(some, modifier_rank=1), torch.no_grad():
            for param in some:
                param.fill_(float(100 * number + engine.global_rank))
        for param in some:
            with GatheredParameters(param):
                assert (param == 100 * number + 1).all()
    first = model.small[0]
    with GatheredParameters(first, modifier_rank=0), torch.no_grad():
        first.fill_(7.0)
        with GatheredParameters(list(model.parameters())):
            assert (first == 7.0).all()
            assert model.large.numel() == 10_000
        assert (first == 7.0).all()
        engine.module(torch.ones(1))  # runs with it, and leaves it whole
        assert (first == 7.0).all()
        with GatheredParameters(first):
            assert (first == 7.0).all()
        assert first.numel() == 8
        with pytest.raises(ConfigError, match="leave the GatheredParameters"):
            engine.partition.gatherer.make_idle()
    assert first.numel() == 0
    engine.backward(engine(torch.ones(1)).sum())
    engine.step()
    with GatheredParameters(first):
        assert (first == 7.0).all()


@pytest.mark.parametrize("count", [2, 3])
def test_changing_parameters_one_by_one(ranks: Ranks, count: int) -> None:
    ranks(count, _changed_one_by_one)


def _read_in_the_middle() -> None:
    """Reading one parameter where its group is whole or on its way moves nothing more, and does not end its use."""
    engine = _engine(_build(), stage3_prefetch_bucket_size=10**6)
    module = engine.module
    seen: list[Any] = []

    def look(running: nn.Module, *_: Any) -> None:
        with GatheredParameters(running.weight):
            seen.append(tuple(running.weight.shape))

    module.blocks[1].down.register_forward_hook(look)
    module.blocks[0].up.register_full_backward_hook(look)
    for step in range(3):
        engine.backward(engine(_inputs(step, engine.grid.rank)).square().mean())
        engine.step()
    assert seen == [(toys.WIDTH, toys.WIDTH)] * 6


def test_reading_a_parameter_while_its_module_runs(ranks: Ranks) -> None:
    ranks(2, _read_in_the_middle)
