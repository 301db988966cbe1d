"""Gradients and alignment under DeepSpeed's names of stages 1 and 2, against torch's own gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys
from xtrain.base.errors import NotImplementedYetError
from xtrain.ops.adam import DeepSpeedCPUAdam
from xtrain.runtime.bf16_optimizer import BF16_Optimizer
from xtrain.runtime.zero.utils import ZeRORuntimeException

MICRO_BATCHES = 2


def _model() -> nn.Module:
    torch.manual_seed(0)
    return toys.TwoLayers(4, 5, 3).bfloat16().float()  # weights that bf16 has, too


def _inputs(rank: int, index: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * rank + index)).bfloat16()


def _engine(stage: int, **more: Any) -> Any:
    model = _model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 20},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        **more,
    }
    return xtrain.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _gradients(micro_batches: int, ranks: int) -> list[torch.Tensor]:
    model = _model()
    for rank in range(ranks):
        for index in range(micro_batches):
            (model(_inputs(rank, index).float()).square().sum() / MICRO_BATCHES / ranks).backward()
    return [param.grad for param in model.parameters() if param.grad is not None]


def _whole_on_every_rank() -> list[list[torch.Tensor]]:
    engine = _engine(1)
    assert isinstance(engine.optimizer, BF16_Optimizer)
    found = []
    for index in range(MICRO_BATCHES):
        found.append(engine.optimizer.fp32_groups_gradients_flat)
        engine.backward(engine(_inputs(engine.global_rank, index)).square().sum())
        if index == MICRO_BATCHES - 1:
            found.append(engine.optimizer.fp32_groups_gradients_flat)
        engine.step()
    return [*found, engine.optimizer.fp32_groups_gradients_flat]


def test_bf16_gradients_are_whole_at_the_end_of_a_window(ranks: Any) -> None:
    wanted = [grad.flatten() for grad in _gradients(MICRO_BATCHES, 2)]
    for before, between, flats, after in ranks(2, _whole_on_every_rank):
        assert before == between == after == []
        assert len(flats) > 1  # several buckets, the last parameters first
        assert {flat.dtype for flat in flats} == {torch.float32}
        flat = torch.cat(flats[::-1])
        torch.testing.assert_close(flat, torch.cat(wanted), rtol=0.05, atol=0.02)


def _added_up(stage: int) -> list[dict[int, torch.Tensor]]:
    engine = _engine(stage, data_types={})
    optimizer = engine.optimizer
    found = [optimizer.accumulated_grads_in_cpu]
    for index in range(MICRO_BATCHES):
        engine.backward(engine(_inputs(engine.global_rank, index)).square().sum())
        found.append(optimizer.accumulated_grads_in_cpu)
        engine.step()
    unit = optimizer.nccl_start_alignment_factor
    for slices in optimizer.parallel_partitioned_bit16_groups:
        assert all(part.storage_offset() % unit == part.data_ptr() % (2 * unit) == 0 for part in slices)
    return [*found, optimizer.accumulated_grads_in_cpu]


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_add_up(ranks: Any, stage: int) -> None:
    for world in (1, 2):
        found = ranks(world, _added_up, stage)
        whole = [_gradients(count, world) for count in (1, 2)]
        for number, grad in enumerate(whole[1]):
            pieces = [parts[2][number].float() for parts in found if number in parts[2]]
            torch.testing.assert_close(torch.cat(pieces), grad.flatten(), rtol=0.05, atol=0.02)
        if stage == 2 or world == 1:  # else still each rank's own
            pieces = [parts[1][0].float() for parts in found if 0 in parts[1]]
            torch.testing.assert_close(torch.cat(pieces), whole[0][0].flatten(), rtol=0.05, atol=0.02)
        assert all(parts[0] == parts[3] == {} for parts in found)


def _a_script_that_sets_the_flag() -> None:
    engine = _engine(2)
    engine.pipeline_parallelism = True
    with (
        pytest.raises(NotImplementedYetError, match="pipeline parallelism"),
        engine.coalesce_grad_reduction(),
    ):
        pass


def test_a_pipeline_of_ones_own_reduces_as_it_wants(ranks: Any) -> None:
    ranks(1, _a_script_that_sets_the_flag)


def _insists(value: bool | None, own: bool) -> str:
    model = _model()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    }
    if value is not None:
        config["zero_force_ds_cpu_optimizer"] = value
    optimizer = (DeepSpeedCPUAdam if own else torch.optim.Adam)(model.parameters())
    try:
        xtrain.initialize(model=model, optimizer=optimizer, config=config)
    except ZeRORuntimeException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_config_may_insist_on_own_optimizers(ranks: Any) -> None:
    answers = {
        (value, own): ranks(1, _insists, value, own)[0]
        for value in (True, False, None)
        for own in (True, False)
    }
    refused = answers.pop((True, False))
    assert refused.startswith("UnsuitableOptimizerError: the config has zero_force_ds_cpu_optimizer: true")
    assert "the optimizer is Adam: pass xtrain.ops.adam.DeepSpeedCPUAdam" in refused
    assert not any(answers.values())
