"""Smaller configuration keys: what they change, against arithmetic by hand, and what they exclude."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import toys, training
from tests.engine.test_corners import _engine
from xtrain.base.errors import ConfigError
from xtrain.config import load_config
from xtrain.engine import gc as garbage


def _sum(stage: int, aligned: bool) -> list[float]:
    model = toys.Weight()
    sums = {"gradient_allreduce_op": "SUM", "prescale_gradients": True, "gradient_predivide_factor": 4.0}
    engine = _engine(model, stage, accumulation=2, **sums, xtrain={"aligned": aligned})
    for index in range(2):
        engine.backward(engine(float(1 + engine.grid.rank + 10 * index)))
        engine.step()
    return [*model.weight.tolist(), engine.get_global_grad_norm()]


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gradients_can_be_summed_over_ranks(ranks: Any, stage: int, aligned: bool) -> None:
    total = (1 + 11) / 2 + (
        2 + 12
    ) / 2  # the accumulation is averaged, the ranks are not, and nothing else divides
    assert ranks(2, _sum, stage, aligned)[1] == [-total] * 4 + [2 * total]
    assert ranks(1, _sum, stage, aligned)[0] == [-6.0] * 4 + [12.0]


def _no_norm(stage: int, bf16: bool) -> tuple[list[Any], list[Any], list[bool]]:
    settings = training.config(stage, micro=8, bf16=bf16, gradient_clipping=0)
    plain = training.train(settings, 4)
    settings["zero_optimization"]["compute_grad_norm"] = False
    without = training.train(settings, 4)
    assert without["losses"] == plain["losses"]
    engine = xtrain.initialize(model=toys.Weight(), config=settings)[0]
    applied = []
    for bad in (False, True, False):
        engine.backward(engine(float("inf") if bad and engine.grid.rank else 1.0))
        engine.step()
        applied.append(engine.was_step_applied())
    return plain["norms"], without["norms"], applied


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_the_norm_can_be_left_out(ranks: Any, stage: int, bf16: bool) -> None:
    for norms, none, applied in ranks(2, _no_norm, stage, bf16):
        assert all(norm > 0 for norm in norms)
        assert none == [None] * 4
        assert applied == [True, False, True]  # overflow is still found, on every rank


def _unmanaged(stage: int, own: bool, folder: str) -> tuple[list[float], list[Any]]:
    model = toys.Weight()
    record = str(Path(folder) / f"{stage}{own}.jsonl")
    engine = _engine(
        model, stage, accumulation=2, managed_gradient_accumulation=False, xtrain={"record": record}
    )
    seen: list[Any] = []
    for backwards in (1, 3):
        for _ in range(backwards):
            loss = engine(float(1 + engine.grid.rank))
            if own:
                loss.backward()
            else:
                engine.backward(loss)
            seen.append(engine.is_gradient_accumulation_boundary())
        engine.step()
        seen += [engine.was_step_applied(), engine.global_steps, engine.global_samples]
    with pytest.raises(ConfigError, match="every step"):
        engine.set_gradient_accumulation_boundary(True)
    return model.weight.tolist(), seen


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_step_is_an_update_without_managed_accumulation(
    ranks: Any, stage: int, own: bool, tmp_path: Path
) -> None:
    for weights, seen in ranks(2, _unmanaged, stage, own, str(tmp_path)):
        assert weights == [-(1.5 / 2) * 4] * 4  # four micro-batches, each divided by the configured two
        samples = (0, 0) if own else (2, 8)  # as in DeepSpeed, the engine's own backwards are counted
        assert seen == [False, True, 1, samples[0], False, False, False, True, 2, samples[1]]
    lines = (tmp_path / f"{stage}{own}.jsonl").read_text().splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["header", "step", "step"]


def _buffers(dtype: str | None) -> list[torch.dtype]:
    model = toys.Weight()
    model.register_buffer("frequencies", torch.ones(3))
    model.register_buffer("count", torch.ones(3, dtype=torch.int32))
    _engine(model, bf16={"enabled": True}, data_types={"param_dtype": "bfloat16", "buffer_dtype": dtype})
    return [model.weight.dtype, model.frequencies.dtype, model.count.dtype]


def test_buffers_can_be_cast(ranks: Any) -> None:
    assert ranks(2, _buffers, "bf16")[1] == [torch.bfloat16, torch.bfloat16, torch.int32]
    assert ranks(1, _buffers, None)[0] == [torch.bfloat16, torch.float32, torch.int32]


def _garbage() -> list[bool]:
    gc.enable()
    seen = []
    first = _engine(toys.Weight(), disable_python_gc=True)
    second = _engine(toys.Weight(), disable_python_gc=True)
    seen.append(gc.isenabled())
    assert first.collect_python_gc() >= 0
    first.destroy()
    first.destroy()
    seen.append(gc.isenabled())
    second.destroy()
    seen.append(gc.isenabled())
    third = _engine(toys.Weight(), disable_python_gc=True)
    seen.append(gc.isenabled())
    garbage._in_child()
    seen.append(gc.isenabled())
    del third
    return seen


def test_garbage_collection_is_off_while_an_engine_asks_for_it(ranks: Any) -> None:
    assert ranks(1, _garbage)[0] == [False, False, True, False, True]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"gradient_allreduce_op": "max"}, "'gradient_allreduce_op' is 'max'"),
        ({"zero_optimization": {"stage": 0, "compute_grad_norm": False}}, "stage 0 does not support"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "set gradient_clipping to 0"),
        (
            {"managed_gradient_accumulation": False, "zero_optimization": {"stage": 1, "overlap_comm": True}},
            "overlap_comm",
        ),
        ({"managed_gradient_accumulation": False, "xtrain": {"aligned": True}}, "aligned mode"),
        ({"data_types": {"param_dtype": "bf16"}}, "parameters are fp32"),
        ({"data_types": {"param_dtype": "fp32"}, "fp16": {"enabled": True}}, "parameters are fp16"),
    ],
)
def test_contradictions_are_one_sentence(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"train_batch_size": 4, **keys})
    assert said in str(caught.value)
    assert str(caught.value).startswith("config: ")
    assert "\n" not in str(caught.value)
