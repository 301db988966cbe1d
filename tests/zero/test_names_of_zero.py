"""Layers and helpers of ZeRO that scripts take by DeepSpeed's names, against torch's own."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import xtrain
from tests import toys
from tests.engine.test_corners import SGD, _engine
from tests.zero.test_stage3 import engine_of, three_steps
from xtrain.base.errors import ConfigError, TrainingError
from xtrain.runtime.sparse_tensor import SparseTensor
from xtrain.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap
from xtrain.runtime.zero.parameter_offload import ZeROOrderedDict, ensure_zero_ordered_dict
from xtrain.runtime.zero.tiling import TiledLinear, TiledLinearReturnBias
from xtrain.zero.init import single_rank_contradiction

# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize(("rows", "columns", "bias"), [(1, 1, True), (3, 2, True), (2, 5, False)])
def test_tiles_compute_what_the_layer_computes(rows: int, columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, bias=bias).double()
    tiled = TiledLinear(
        7, 5, bias, in_splits=columns, out_splits=rows, init_linear=layer, dtype=torch.float64
    )
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(tiled(x), layer(x))
    layer(x).square().sum().backward()
    tiled(x).square().sum().backward()
    for row in range(rows):
        for column in range(columns):
            tile = tiled.linears[row][column]
            area = (
                slice(tiled.out_parts[row], tiled.out_parts[row + 1]),
                slice(tiled.in_parts[column], tiled.in_parts[column + 1]),
            )
            torch.testing.assert_close(tile.weight.grad, layer.weight.grad[area])
            if tile.bias is not None:
                torch.testing.assert_close(tile.bias.grad, layer.bias.grad[area[0]])


class _ReturnsBias(nn.Linear):
    def forward(self, input: torch.Tensor) -> Any:
        return F.linear(input, self.weight), self.bias


def test_tiles_in_other_forms() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    in_lists = TiledLinear(
        6, 4, in_splits=2, out_splits=2, input_is_already_split=True, combine_out_splits=False
    )
    in_lists.copy_params_from(layer)
    outputs = in_lists(list(x.split(3, dim=-1)))
    torch.testing.assert_close(torch.cat(outputs, dim=-1), layer(x))
    apart = TiledLinearReturnBias(6, 4, in_splits=2, out_splits=2, linear_cls=_ReturnsBias, init_linear=layer)
    output, bias = apart(x)
    torch.testing.assert_close(output + bias, layer(x))
    with pytest.raises(RuntimeError, match="in_splits must be between 1 and the 6 features, not 7"):
        TiledLinear(6, 4, in_splits=7)
    with pytest.raises(ConfigError, match="bias"):
        TiledLinear(6, 4, bias=False).copy_params_from(layer)


def _tiles_in_stage_3() -> tuple[torch.Tensor, torch.Tensor, int]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    tiled = TiledLinear(6, 4, in_splits=2, out_splits=2, init_linear=layer)
    engine = _engine(tiled, 3)
    x = torch.ones(1, 6) * (1 + engine.grid.rank)
    engine.backward(engine(x).square().sum())
    held = sum(param.numel() for param in tiled.parameters())
    engine.step()
    weight = engine.module_state_dict()["linears.1.0.weight"].clone()
    loss = sum(layer(torch.ones(1, 6) * factor).square().sum() for factor in (1, 2)) / 2
    loss.backward()
    return weight, (layer.weight - layer.weight.grad)[2:, :3].detach(), held


def test_tiles_train_in_stage_3(ranks: Any) -> None:
    for found, expected, held in ranks(2, _tiles_in_stage_3):
        torch.testing.assert_close(found, expected)
        assert held == 0  # after backward none is whole


# ---------------------------------------------------------------- the linear function


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_linear_function_is_torchs(shape: tuple[int, ...], autocast: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(4, 8), torch.randn(4)]
    results = []
    for function in (zero3_linear_wrap, F.linear):
        x, weight, bias = (tensor.clone().requires_grad_() for tensor in inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x, weight, bias)
        # Autocast around the backward must not matter to ours.
        with torch.autocast("cpu", torch.bfloat16, enabled=function is zero3_linear_wrap):
            y.float().square().sum().backward()
        results.append((y, x.grad, weight.grad, bias.grad))
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(
            mine, theirs, rtol=2e-2 if autocast else 1e-5, atol=0.2 if autocast else 1e-5
        )


def test_the_linear_function_under_torch_func() -> None:
    weight, rows = torch.randn(4, 8), torch.randn(5, 8)
    mapped = torch.func.vmap(lambda row: LinearFunctionForZeroStage3.apply(row, weight, None))(rows)
    torch.testing.assert_close(mapped, rows @ weight.t())
    grad, value = torch.func.grad_and_value(lambda w: zero3_linear_wrap(rows, w).sum())(weight)
    torch.testing.assert_close(grad, rows.sum(0).expand(4, 8))
    torch.testing.assert_close(value, (rows @ weight.t()).sum())


# ---------------------------------------------------------------- sparse rows


def test_sparse_rows_add_up() -> None:
    embedding = nn.Embedding(6, 3, sparse=True)
    dense = torch.zeros(6, 3)
    total = None
    for numbers in ([1, 4], [4, 5]):
        embedding.zero_grad()
        embedding(torch.tensor(numbers)).square().sum().backward()
        assert embedding.weight.grad is not None
        rows = SparseTensor(embedding.weight.grad)
        dense += embedding.weight.grad.to_dense()
        if total is None:
            total = rows
        else:
            total.add(rows)
    assert total is not None
    torch.testing.assert_close(total.to_coo_tensor().to_dense(), dense)
    assert total.sparse_size() == (4 + 4 * 3, 18)
    with pytest.raises(AssertionError, match="sparse tensor"):
        SparseTensor(torch.ones(2, 2))


# ---------------------------------------------------------------- zero.Init and GatheredParameters


@pytest.mark.parametrize(
    ("ranks_", "given", "told", "refused"),
    [(1, None, "8", True), (8, None, "8", False), (1, object(), "8", False), (1, None, "1", False),
     (1, None, None, False), (1, None, "many", False)],
)  # fmt: skip
def test_one_rank_where_several_were_launched(ranks_: int, given: Any, told: Any, refused: bool) -> None:
    problem = single_rank_contradiction(ranks_, given, {"WORLD_SIZE": told})
    assert (problem is not None) == refused
    if problem is not None:
        assert "WORLD_SIZE=8" in problem
        assert "init_distributed" in problem


def _changed(checks: bool) -> list[str]:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": SGD,
        "zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 0, "enable_sanity_checks": checks,
        },
    }  # fmt: skip
    with xtrain.zero.Init(config_dict_or_path=settings):
        model = nn.Linear(4, 4)
    found = []
    for _ in range(2):  # before and after the engine has taken the model over
        try:
            with xtrain.zero.GatheredParameters(model.weight), torch.no_grad():
                if xtrain.comm.get_rank() == 1:
                    model.weight.add_(1.0)
            found.append("lost")
        except TrainingError as error:
            found.append("told" if "in-place modification" in str(error) else str(error))
        with xtrain.zero.GatheredParameters(model.weight):
            found.append("whole" if model.weight.numel() == 16 else "not whole")
        if not hasattr(model, "taken"):
            model.taken = xtrain.initialize(model=model, config=settings)[0].train_batch_size()
    return found


@pytest.mark.parametrize("checks", [False, True])
def test_lost_changes_are_told_on_every_rank_on_request(ranks: Any, checks: bool) -> None:
    told = "told" if checks else "lost"
    assert ranks(2, _changed, checks) == [[told, "whole", told, "whole"]] * 2


def _inside_init() -> tuple[list[bool], float]:
    with xtrain.zero.Init():
        model = toys.Weight()
        engine = _engine(model, 0)
        later = nn.Linear(2, 2)
    divided = [
        hasattr(param, "ds_id") and not param.numel() for param in (*model.parameters(), *later.parameters())
    ]
    engine.backward(engine(2.0))
    engine.step()
    return divided, float(engine.module.weight.sum())


def test_an_engine_may_be_made_inside_of_zero_init(ranks: Any) -> None:
    assert ranks(2, _inside_init)[0] == ([False, True, True], -8.0)


def _generates(generate: bool) -> list[float]:
    engine = engine_of(toys.LanguageModel("tied"), 3)
    losses = three_steps(engine)
    if generate:
        with xtrain.zero.unwrap_model_for_generation(engine), torch.no_grad():
            assert not engine.optimizer.parameter_offload.forward_hooks
            for _ in range(1 + 2 * engine.grid.rank):  # each rank as often as it likes
                engine.module(torch.arange(8).reshape(2, 4) % 16)
        assert engine.optimizer.parameter_offload.forward_hooks
    return losses + three_steps(engine)


def test_ranks_may_generate_at_their_own_pace(ranks: Any) -> None:
    assert ranks(2, _generates, True) == ranks(2, _generates, False)


class _LendsItsBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = _ReturnsBias(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, bias = self.first(x)
        return self.second(y + bias).sum()


def _attributes() -> tuple[list[bool], list[int], int, bool]:
    model = _LendsItsBias()
    xtrain.zero.register_external_parameter(model, model.second.weight)
    engine = _engine(model, 3)
    engine.backward(engine(torch.ones(1, 4)))
    external = [param.is_external_param for param in model.parameters()]
    numbers = [param.partition_numel() for param in model.parameters()]
    whole = io.BytesIO()
    with xtrain.zero.GatheredParameters(model.parameters()):
        torch.save(model.second.bias, whole)
    return (
        external,
        numbers,
        sum(numbers),
        not any(param.ds_active_sub_modules for param in model.parameters()),
    )


def test_attributes_of_divided_parameters(ranks: Any) -> None:
    (external, mine, _, idle), (_, others, _, _) = ranks(2, _attributes)
    assert external == [False, True, True, False]  # lent to the caller, and registered
    assert [a + b for a, b in zip(mine, others, strict=True)] == [16, 4, 16, 4]
    assert idle


def test_dictionaries_of_parameters_can_be_watched() -> None:
    layer = nn.Linear(2, 2)
    former = layer._parameters
    ensure_zero_ordered_dict(layer)
    watched = layer._parameters
    ensure_zero_ordered_dict(layer)
    ensure_zero_ordered_dict(object())
    assert layer._parameters is watched
    assert isinstance(watched, ZeROOrderedDict)
    assert layer._original_parameters is former
    assert layer.weight is former["weight"]


def _views_of_states(stage: int) -> tuple[list[bool], float, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    engine = _engine(model, stage, zero_optimization={"stage": stage, "reduce_bucket_size": 36})
    optimizer = engine.optimizer
    engine.backward(engine(torch.ones(1, 6) * (1 + engine.grid.rank)).square().sum())
    same = []
    if stage < 3:
        groups, flats = optimizer.bit16_groups, optimizer.bit16_groups_flat
        parts = optimizer.parallel_partitioned_bit16_groups
        for params, flat, slices in zip(groups, flats, parts, strict=True):
            same += [torch.equal(flat, torch.cat(slices)), flat.data_ptr() == slices[0].data_ptr()]
            same += [bool((flat.unsqueeze(0) == param.reshape(-1, 1)).any()) for param in params]
        norm = 0.0
    else:
        norm = float(torch.linalg.vector_norm(torch.stack(optimizer._get_norm_groups())))
    engine.step()
    return same, norm, engine.get_global_grad_norm()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_views_of_divided_states(ranks: Any, stage: int) -> None:
    for same, norm, expected in ranks(2, _views_of_states, stage):
        assert all(same)
        assert stage < 3 or norm == pytest.approx(expected)


# ---------------------------------------------------------------- the config


def _leaves_by_config(section: dict[str, Any]) -> tuple[list[str], list[float]]:
    torch.manual_seed(0)
    model = toys.ByRank()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": SGD,
        "zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 0, "leaf_module": section,
        },
    }  # fmt: skip
    engine = xtrain.initialize(model=model, config=settings)[0]
    engine.backward(engine(torch.ones(1, toys.WIDTH, requires_grad=True)).sum())
    engine.step()
    marked = [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]
    return marked, engine.module_state_dict()["head.bias"].tolist()


@pytest.mark.parametrize(
    "section",
    [
        {"classes": "torch.nn.modules.container.ModuleList"},
        {"names": ["blocks", "blocks"]},
        {"name_suffixes": "ocks"},
    ],
)
def test_the_config_names_leaf_modules(ranks: Any, section: dict[str, Any]) -> None:
    # Each rank runs another block, which stage 3 allows inside a leaf module only.
    (marked, mine), (_, other) = ranks(2, _leaves_by_config, section)
    assert marked == ["blocks"]
    assert mine == other


def _travels(stage: int, modules: list[str] | None) -> tuple[list[Any], list[float], list[float]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    engine = _engine(
        model,
        stage,
        torch_autocast={"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": modules},
    )
    x = torch.full((1, 4), 1.0 + engine.grid.rank / 3)
    engine.backward(engine(x).square().sum())
    own = xtrain.runtime.torch_autocast.get_comm_dtype(model[0].weight)
    grads = [xtrain.utils.safe_get_full_grad(param) for param in (model[0].weight, model[1].weight)]
    rounded = [float((grad.bfloat16().float() - grad).abs().max()) for grad in grads]
    return [own, hasattr(model[1].weight, "comm_dtype")], rounded, [float(grad.abs().max()) for grad in grads]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_of_named_modules_travel_in_the_autocast_dtype(ranks: Any, stage: int) -> None:
    for modules, low in (
        (None, True),
        ([], False),
        (["torch.nn.Linear"], True),
        (["torch.nn.Conv1d"], False),
    ):
        (own, norm), (of_linear, of_norm), sizes = ranks(2, _travels, stage, modules)[0]
        assert own == (torch.bfloat16 if low else torch.float32)
        assert not norm
        # The sum of two ranks is a bfloat16 times 1/2; in float32 it is hardly ever one.
        assert (of_linear == 0) == low
        assert of_norm > 0
        assert all(sizes)


def _unknown_module() -> str:
    with pytest.raises(ConfigError) as caught:
        _engine(
            toys.Weight(),
            torch_autocast={"enabled": True, "lower_precision_safe_modules": ["torch.nn.Linaer"]},
        )
    return str(caught.value)


def test_an_unknown_module_is_named(ranks: Any) -> None:
    assert "'torch.nn.Linaer' cannot be imported" in ranks(1, _unknown_module)[0]
