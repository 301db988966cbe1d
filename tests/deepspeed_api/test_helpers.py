"""Groups, leaf modules, OnDevice, logging and names: what scripts import from deepspeed.utils."""

from __future__ import annotations

import importlib
import itertools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import xtrain
from tests import toys, training
from xtrain import utils
from xtrain.base.errors import ConfigError
from xtrain.utils import groups
from xtrain.utils import logging as utils_logging


def _groups() -> list[Any]:
    xtrain.initialize(model=training.build_model(), config=training.config(1))
    world = [
        groups._get_data_parallel_world_size(),
        groups._get_data_parallel_rank() == dist.get_rank(),
        groups._get_data_parallel_group_ranks(),
        groups._get_broadcast_src_rank(),
        groups._get_sequence_parallel_world_size(),
        groups.get_model_parallel_world_size(),
        groups._get_sequence_data_parallel_world_size(),
    ]
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[dist.get_rank() // 2]
    mpu = SimpleNamespace(
        get_model_parallel_world_size=lambda: 1,
        get_model_parallel_rank=lambda: 0,
        get_data_parallel_group=lambda: mine,
        get_data_parallel_world_size=lambda: 2,
        get_data_parallel_rank=lambda: dist.get_rank() % 2,
    )
    xtrain.initialize(model=training.build_model(), config=training.config(1), mpu=mpu)
    world += [
        groups.get_data_parallel_world_size(),
        groups._get_data_parallel_group_ranks(),
        groups._get_broadcast_src_rank(),
    ]
    groups.mpu = None
    return world


def test_groups(ranks: Any) -> None:
    results = ranks(4, _groups)
    for rank, result in enumerate(results):
        assert result[:7] == [4, True, [0, 1, 2, 3], 0, 1, 1, 4]
        assert result[7:] == [2, [0, 1] if rank < 2 else [2, 3], 0 if rank < 2 else 2]


def _expert_groups() -> dict[str, Any]:
    groups._create_expert_and_data_parallel(2)
    groups._create_expert_and_data_parallel(2)  # made once
    name = groups._get_max_expert_size_name()
    with pytest.raises(KeyError, match="ep_size_4"):
        groups._get_expert_parallel_group("ep_size_4")
    summed = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(summed, group=groups._get_expert_data_parallel_group(name))
    return {
        "name": name,
        "experts": dist.get_process_group_ranks(groups._get_max_expert_parallel_group()),
        "same": dist.get_process_group_ranks(groups._get_expert_data_parallel_group(name)),
        "sum": summed.item(),
        "numbers": (groups._get_expert_parallel_rank(name), groups._get_expert_data_parallel_rank(name)),
    }


def test_groups_for_experts_of_a_script(ranks: Any) -> None:
    for rank, found in enumerate(ranks(4, _expert_groups)):
        same = [rank % 2, rank % 2 + 2]
        assert found == {
            "name": "ep_size_2",
            "experts": [rank // 2 * 2, rank // 2 * 2 + 1],
            "same": same,
            "sum": float(sum(same)),
            "numbers": (rank % 2, rank // 2),
        }


def test_ranks_of_expert_groups_cover_everybody_once() -> None:
    """For all divisions of 16 ranks: each group of a kind meets each group of the other kind in one rank at most."""
    for tensor, expert, stages, before in itertools.product((1, 2), (1, 2, 4), (1, 2), (False, True)):
        experts, data = groups._get_expert_parallel_ranks(16, tensor, expert, stages, before)
        assert {len(group) for group in experts} == {expert}
        for kind in (experts, data):
            assert sorted(rank for group in kind for rank in group) == list(range(16))
        assert all(len(set(one) & set(other)) <= 1 for one in experts for other in data)
        # with data first, ranks of one expert-parallel group are as far apart as they can be
        assert (experts[0][1:2] == [tensor]) is (
            expert > 1 and (not before or expert * tensor * stages == 16)
        )
    with pytest.raises(ConfigError, match="cannot be divided"):
        groups._get_expert_parallel_ranks(6, 1, 4)


def _mixture() -> nn.Module:
    return nn.ModuleDict(
        {"router": nn.Linear(2, 2), "experts": nn.ModuleList([toys.TwoLayers(2, 2, 2) for _ in range(2)])}
    )


def test_leaf_modules_by_class() -> None:
    model = _mixture()
    experts = list(model["experts"])
    for kind in (toys.TwoLayers, "TwoLayers", f"{toys.__name__}.TwoLayers"):
        assert utils.set_z3_leaf_modules(model, [kind]) == experts
        assert utils.get_z3_leaf_modules(model) == experts
        assert all(utils.z3_leaf_module(expert) and expert._z3_leaf for expert in experts)
        assert utils.z3_leaf_parameter(experts[0].first.weight)
        assert not utils.z3_leaf_parameter(model["router"].weight)
        assert utils.unset_z3_leaf_modules(model, [kind]) == experts
        assert utils.get_z3_leaf_modules(model) == []
        assert not utils.z3_leaf_parameter(experts[0].first.weight)
    with pytest.raises(ConfigError, match="no module of class Conv2d"):
        utils.set_z3_leaf_modules(model, [nn.Conv2d])
    assert utils.set_z3_leaf_modules(model, [nn.Conv2d], raise_if_not_found=False) == []
    with pytest.raises(ConfigError, match="types or names"):
        utils.set_z3_leaf_modules(model, [3])  # type: ignore[list-item]


def test_leaf_modules_by_name() -> None:
    model = _mixture()
    found, missing = utils.set_z3_leaf_modules_by_name(model, ["experts.1", "x"], raise_if_not_found=False)
    assert (found, missing) == ([model["experts"][1]], ["x"])
    found, missing = utils.set_z3_leaf_modules_by_suffix(model, [".first"])
    assert (found, missing) == ([expert.first for expert in model["experts"]], [])
    utils.set_z3_leaf_module(model["experts"][1], False)
    assert utils.get_z3_leaf_modules(model) == found
    with pytest.raises(ConfigError, match="is named x"):
        utils.set_z3_leaf_modules_by_name(model, ["x"])


def test_on_device() -> None:
    with utils.OnDevice(dtype=torch.float16, device="meta"):
        model = nn.Sequential(nn.Linear(1 << 15, 1 << 15), nn.BatchNorm1d(4))
        with utils.OnDevice(dtype=torch.bfloat16, device="cpu"):
            inner = nn.Linear(2, 2)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float16)}
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert (inner.weight.device.type, inner.weight.dtype) == ("cpu", torch.bfloat16)
    with utils.OnDevice(dtype=torch.float16, enabled=False):
        assert nn.Linear(2, 2).weight.dtype == torch.float32
    with pytest.raises(ZeroDivisionError), utils.OnDevice(dtype=torch.float16):
        1 / 0  # noqa: B018
    assert torch.ones(1).dtype == torch.float32
    assert torch.ones(1).device.type == "cpu"


def test_logging(
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    before = utils.logger.level
    with caplog.at_level(logging.INFO, logger="xtrain"):
        for _ in range(2):
            utils.log_dist_once("once", ranks=[1])
            utils_logging.warning_once("careful")
        utils.log_dist("not here", ranks=[0])
    assert [record.message for record in caplog.records] == ["once", "careful"]
    utils_logging.print_dist("hello", ranks=[1])
    utils_logging.print_dist("not here", ranks=[0])
    assert capsys.readouterr().out == "[Rank 1] hello\n"
    utils_logging.print_json_dist({"loss": 1.5}, [1], tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": 1.5, "rank": 1}
    utils.set_log_level_from_string("error")
    assert not utils_logging.should_log_le("info")
    assert utils_logging.should_log_le("error")
    utils.logger.setLevel(before)
    with pytest.raises(ConfigError, match="did you mean 'warning'"):
        utils.set_log_level_from_string("warnin")


def test_every_name_can_be_imported() -> None:
    for name in utils.__all__:
        assert getattr(utils, name) is not None
    assert utils.RepeatingLoader is xtrain.RepeatingLoader
    assert utils.tensor_fragment.safe_get_full_grad is utils.safe_get_full_grad
    importlib.import_module("xtrain.utils.z3_leaf_module")  # does not put the module in the function's place
    assert utils.z3_leaf_module(torch.nn.Linear(1, 1)) is False
    with pytest.raises(AttributeError, match=r"utils\.link_hp_params \(.*\) is not there yet"):
        _ = utils.link_hp_params


@pytest.mark.deepspeed
def test_deepspeed_has_these_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    theirs = pytest.importorskip("deepspeed.utils", reason="needs the extra deepspeed")
    assert [name for name in utils.__all__ if not hasattr(theirs, name)] == []


def test_a_repeating_loader_takes_anything_that_can_be_iterated_again() -> None:
    loader = xtrain.RepeatingLoader([1, 2])
    assert [next(loader) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert next(iter(loader)) == 2  # it is its own iterator
    samples = torch.utils.data.TensorDataset(torch.arange(3))
    batches = xtrain.RepeatingLoader(torch.utils.data.DataLoader(samples))
    assert [int(next(batches)[0]) for _ in range(4)] == [0, 1, 2, 0]
    with pytest.raises(StopIteration):
        next(xtrain.RepeatingLoader([]))
