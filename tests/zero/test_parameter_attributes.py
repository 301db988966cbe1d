"""What a parameter of stage 3 tells about itself under DeepSpeed's names, and what is left of it after a gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys
from xtrain.base.errors import ConfigError
from xtrain.runtime.zero.offload_states import get_state_devices
from xtrain.runtime.zero.partition_parameters import is_zero_param
from xtrain.utils import safe_get_local_fp32_param
from xtrain.zero import GatheredParameters, Init, ZeroParamStatus, unwrap_model_for_generation
from xtrain.zero.offload import OffloadStateTypeEnum


def _config(threshold: int = 0, **extra: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": threshold},
        **extra,
    }


def _two() -> nn.Module:
    model = toys.TwoLayers(4, 5, 4)
    model.second.bias.requires_grad_(False)
    return model


def _attributes(from_init: bool) -> list[list[float]]:
    torch.manual_seed(3)
    with Init(config_dict_or_path=_config(10), enabled=from_init):
        model = _two()
    if from_init:
        assert model.first.weight.ds_tensor.numel() == 10
        assert model.first.bias.ds_tensor.numel() == 3
        assert model.first.bias.ds_status is ZeroParamStatus.NOT_AVAILABLE
    engine, *_ = xtrain.initialize(model=model, config=_config(10))
    for name, param in model.named_parameters():
        assert is_zero_param(param) or name == "second.bias"
        assert param.ds_persist is name.endswith("bias")
        expected = ZeroParamStatus.AVAILABLE if param.ds_persist else ZeroParamStatus.NOT_AVAILABLE
        assert param.ds_status is expected, name
        if param.requires_grad:
            master = safe_get_local_fp32_param(param)
            assert torch.equal(master.reshape(-1), param.ds_tensor)
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()
    for param in model.parameters():
        if param.requires_grad:
            assert torch.equal(safe_get_local_fp32_param(param).reshape(-1), param.ds_tensor)
    with GatheredParameters(model):
        whole = [param.detach().flatten().tolist() for param in model.parameters()]
    pieces: list[Any] = [None, None]
    mine = [param.ds_tensor.tolist() for param in model.parameters()]
    xtrain.comm.all_gather_object(pieces, mine)
    for number, param in enumerate(model.parameters()):
        if param.requires_grad:
            assert pieces[0][number] + pieces[1][number] == whole[number]
    assert not is_zero_param(nn.Parameter(torch.zeros(1)))
    return whole


def test_every_parameter_of_stage_3_describes_itself(ranks: Callable[..., list[Any]]) -> None:
    plain, built = ranks(2, _attributes, False), ranks(2, _attributes, True)
    assert plain[0] == plain[1]
    assert built[0] == built[1]


def _taken_out() -> None:
    model = _two()
    engine, *_ = xtrain.initialize(model=model, config=_config())
    with GatheredParameters(model.first.weight):
        kept = model.first.weight.detach().cpu()
        before = kept.clone()
    assert model.first.weight.numel() == 0
    assert torch.equal(kept, before)
    with GatheredParameters(model.first.bias):
        bias = model.first.bias.detach().clone()
    for together in ([model.first.weight], list(model.first.parameters())):
        with GatheredParameters(together, modifier_rank=1), torch.no_grad():
            model.first.weight.fill_(float(xtrain.comm.get_rank()))
            # A forward pass inside sees the value that the parameter has now.
            assert torch.equal(
                model.first(torch.ones(1, 4)), torch.full((1, 5), 4.0 * xtrain.comm.get_rank()) + bias
            )
            assert model.first.weight.numel() == 20
    with GatheredParameters(model.first.weight):
        assert torch.equal(model.first.weight, torch.ones(5, 4))
    with unwrap_model_for_generation(engine) as unwrapped:
        assert unwrapped is engine
        assert all(param.numel() for param in model.parameters())
        with torch.no_grad():
            outputs = [model(torch.ones(1, 4)) for _ in range(2)]
        assert torch.equal(*outputs)
    assert model.first.weight.numel() == 0
    engine.backward(engine(torch.ones(1, 4)).sum())
    engine.step()


def test_what_is_taken_out_of_a_gathered_parameter_stays(ranks: Callable[..., list[Any]]) -> None:
    ranks(2, _taken_out)


def _skip_init() -> None:
    class WithDevice(nn.Module):
        def __init__(self, width: int, device: Any = None) -> None:
            super().__init__()
            self.inner = nn.Linear(width, width, device=device)

    with Init():
        layer = nn.utils.skip_init(nn.Linear, 4, 4)
        block = nn.utils.skip_init(WithDevice, 4)
    assert layer.weight.ds_tensor.numel() == block.inner.weight.ds_tensor.numel() == 8
    with GatheredParameters(layer.weight):
        assert layer.weight.shape == (4, 4)


def test_modules_that_are_built_without_values(ranks: Callable[..., list[Any]]) -> None:
    ranks(2, _skip_init)


def _devices(stage: int) -> None:
    config = _config(bf16={"enabled": True})
    config["zero_optimization"]["stage"] = stage
    engine, *_ = xtrain.initialize(model=_two(), config=config)
    assert get_state_devices(engine, OffloadStateTypeEnum.optim_states) == set()
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
    engine.step()
    for kind in OffloadStateTypeEnum:
        assert get_state_devices(engine, kind) == {torch.device("cpu")}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_where_states_are(ranks: Callable[..., list[Any]], stage: int) -> None:
    ranks(2, _devices, stage)


def _averaged(stage: int) -> list[float]:
    model = nn.Linear(3, 1, bias=False)
    config = _config()
    config["zero_optimization"]["stage"] = stage
    engine, *_ = xtrain.initialize(model=model, config=config)
    assert engine.optimizer.averaged_gradients == {}
    engine.backward(engine(torch.full((1, 3), float(xtrain.comm.get_rank()))).sum())
    found = engine.optimizer.averaged_gradients
    assert set(found) <= {0}
    mine = [value for part in found.get(0, []) for value in part.tolist()]
    engine.step()
    assert engine.optimizer._global_grad_norm == pytest.approx(3**0.5 / 2)
    return mine


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_averaged_gradients_are_what_this_rank_owns(ranks: Callable[..., list[Any]], stage: int) -> None:
    first, second = ranks(2, _averaged, stage)
    assert first + second == [0.5] * 3


def _by_hand(from_init: bool) -> None:
    """Against a copy of the whole weights, made before they are divided."""
    torch.manual_seed(3)
    wanted = [param.detach().clone() for param in _two().parameters()]
    torch.manual_seed(3)
    with Init(config_dict_or_path=_config(), enabled=from_init):
        model = _two()
    engine = None if from_init else xtrain.initialize(model=model, config=_config())[0]
    params = list(model.parameters())
    assert not any(param.numel() for param in params)
    params[0].all_gather_coalesced(params).wait()
    for param, whole in zip(params, wanted, strict=True):
        assert torch.equal(param, whole)
        assert param.ds_status is ZeroParamStatus.AVAILABLE
    params[0].all_gather()  # it is whole already
    with torch.no_grad():
        params[0].fill_(2.0)
        params[1].fill_(3.0)
    params[0].partition(params[:1], has_been_updated=True)
    params[1].partition(params[1:])
    params[1].partition()  # it is divided already
    assert not any(param.numel() for param in params)
    with GatheredParameters(params):
        assert bool((params[0] == 2.0).all())
        for param, whole in zip(params[1:], wanted[1:], strict=True):
            assert torch.equal(param, whole)
    if engine is not None:
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
        engine.backward(engine(torch.ones(1, 4)).sum())
        params[1].all_gather()
        with pytest.raises(ConfigError, match=r"step\(\) was called while"):
            engine.step()
        params[1].partition()


@pytest.mark.parametrize("from_init", [True, False])
def test_parameters_are_gathered_by_hand(ranks: Any, from_init: bool) -> None:
    ranks(2, _by_hand, from_init)
