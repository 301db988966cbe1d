"""Names that scripts and DeepSpeed's own tests import: what they answer, and how those that are refused fail."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError
from torch import nn

import xtrain
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.base.stand_ins import refused_class
from xtrain.config import load_config
from xtrain.moe.utils import (
    has_moe_layers,
    is_moe_param,
    split_params_into_different_moe_groups_for_optimizer,
)
from xtrain.ops import op_builder
from xtrain.pipe import LayerSpec, PipelineModule
from xtrain.runtime import precision_config
from xtrain.runtime import utils as runtime_utils
from xtrain.runtime.config_utils import DeepSpeedConfigModel
from xtrain.runtime.fp16.fused_optimizer import FP16_Optimizer
from xtrain.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from xtrain.runtime.zero.config import DeepSpeedZeroConfig, DeepSpeedZeroOffloadParamConfig
from xtrain.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from xtrain.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from xtrain.runtime.zero.utils import is_zero_supported_optimizer
from xtrain.utils.bwc import bwc_tensor_model_parallel_rank, bwc_tensor_model_parallel_world_size
from xtrain.utils.nvtx import instrument_w_nvtx
from xtrain.utils.torch import required_torch_version

# ---------------------------------------------------------------- refused, and said so


def test_a_refused_class_can_be_derived_from_and_says_what_to_do_when_made() -> None:
    class Mine(PipelineModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(layers=[])

    with pytest.raises(NotImplementedYetError, match=r"pipe\.PipelineModule \(pipeline parallelism\)"):
        Mine()
    with pytest.raises(NotImplementedError, match="an mpu with a pipeline"):
        LayerSpec(nn.Linear, 2, 2)
    assert not isinstance(nn.Linear(1, 1), PipelineModule)
    with pytest.raises(AssertionError):
        refused_class("something.that.deepspeed.never.had")


def test_models_without_experts_pass_through_the_helpers_for_experts() -> None:
    param = nn.Parameter(torch.zeros(1))
    group = {"params": [param], "name": "all"}
    assert split_params_into_different_moe_groups_for_optimizer(group) == [group]
    assert has_moe_layers(nn.Linear(1, 1)) == (False, 0)
    assert not is_moe_param(param)
    param.allreduce = False  # type: ignore[attr-defined]
    assert is_moe_param(param)
    with pytest.raises(NotImplementedYetError, match="experts"):
        split_params_into_different_moe_groups_for_optimizer([group])


def test_builders_tell_what_there_is_and_load_nothing() -> None:
    compatible = xtrain.ops.__compatible_ops__
    assert compatible[op_builder.FusedAdamBuilder.NAME]
    assert compatible[op_builder.CPUAdamBuilder.NAME]
    assert not compatible[op_builder.AsyncIOBuilder.NAME]
    assert xtrain.ops.__compatible_ops__ is compatible
    for name in op_builder.__all__:
        builder = getattr(op_builder, name)()
        if name == "PinMemoryBuilder":
            continue  # loads what needs no compiling: test_pin_memory.py
        with pytest.raises(NotImplementedYetError, match=builder.NAME):
            builder.load()
        if builder.optimizer is not None:
            module, _, title = builder.optimizer.partition(".")
            assert issubclass(getattr(getattr(xtrain.ops, module), title), torch.optim.Optimizer)


# ---------------------------------------------------------------- sections by themselves


def test_a_zero_section_by_itself() -> None:
    assert isinstance(
        DeepSpeedZeroConfig(cpu_offload_param=True).offload_param, DeepSpeedZeroOffloadParamConfig
    )
    assert DeepSpeedZeroConfig(stage=3).overlap_comm is True
    assert DeepSpeedZeroConfig(stage=2).overlap_comm is False
    assert DeepSpeedZeroConfig(stage=2, overlap_comm=True).overlap_comm is True
    old = DeepSpeedZeroConfig(stage3_gather_fp16_weights_on_model_save=True)
    assert old.gather_16bit_weights_on_model_save
    with pytest.raises(ValueError, match="reduce_bucket_size"):
        DeepSpeedZeroConfig(reduce_bucket_size=0)


def test_precision_sections_by_themselves() -> None:
    assert precision_config.get_bfloat16_config({"bfloat16": {"enabled": True}}).enabled
    assert not precision_config.get_bfloat16_config({}).enabled
    assert precision_config.get_float16_config({"fp16": {"hysteresis": 5, "enabled": "auto"}}).hysteresis == 5
    with pytest.raises(ValidationError, match="finite"):
        precision_config.DeepSpeedFP16Config(loss_scale=math.inf)


class _Section(DeepSpeedConfigModel):
    count: int = 0
    names: list[str] | None = None
    name: str | None = Field(
        None,
        json_schema_extra={"deprecated": True, "new_param": "names", "new_param_fn": lambda name: [name]},  # type: ignore[dict-item]
    )


def test_a_section_of_a_scripts_own_with_a_deprecated_key() -> None:
    assert _Section(name="a").names == ["a"]
    assert _Section(count="auto").count == 0
    with pytest.raises(ConfigError, match="'name', which is deprecated, and 'names'"):
        _Section(name="a", names=["b"])
    with pytest.raises(ValidationError):
        _Section(nmae="a")


def test_offload_param_below_stage_3_is_reported_and_not_an_error() -> None:
    config = {"train_batch_size": 1, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    (notice,) = load_config(config).notices
    assert "offload_param" in notice
    assert "stage 3" in notice


def test_a_config_in_hjson(tmp_path: Any) -> None:
    pytest.importorskip("hjson")
    path = tmp_path / "config.json"
    path.write_text("{\n  # the batch\n  train_batch_size: 8\n}")
    assert load_config(path).values.train_batch_size == 8
    path.write_text("{train_batch_size: 8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(path)


# ---------------------------------------------------------------- small functions


def test_versions_of_torch() -> None:
    major, minor = map(int, torch.__version__.split(".")[:2])
    assert required_torch_version(min_version=1.8)
    assert required_torch_version(min_version=f"{major}.{minor}")
    assert not required_torch_version(min_version=f"{major}.{minor + 1}")
    assert not required_torch_version(max_version="1.13")
    with pytest.raises(ConfigError):
        required_torch_version()


def test_the_methods_of_an_mpu_under_their_old_and_new_names() -> None:
    class Old:
        def get_model_parallel_rank(self) -> int:
            return 3

    class New(Old):
        def get_tensor_model_parallel_rank(self) -> int:
            return 5

    assert [bwc_tensor_model_parallel_rank(mpu) for mpu in (None, Old(), New())] == [0, 3, 5]
    assert bwc_tensor_model_parallel_world_size() == 1
    with pytest.raises(ConfigError, match="get_model_parallel_world_size"):
        bwc_tensor_model_parallel_world_size(Old())


def test_a_decorated_function_is_a_range() -> None:
    @instrument_w_nvtx
    def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    with torch.profiler.profile() as profile:
        assert add(torch.ones(1), b=torch.ones(1)).item() == 2.0
    assert any(add.__qualname__ in event.key for event in profile.key_averages())


@pytest.mark.parametrize(
    ("weights", "parts", "bounds"),
    [
        ([1, 1, 1, 1, 1], 4, [0, 2, 3, 4, 5]),
        ([1, 1, 1, 1, 1, 1, 1], 3, [0, 3, 5, 7]),
        ([5, 1, 1, 1, 1], 2, [0, 1, 5]),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 3, [0, 5, 7, 9]),
        ([0, 0, 0, 1], 2, [0, 3, 4]),
        ([100, 1, 1], 2, [0, 1, 3]),
        ([3, 0, 0, 0, 3], 3, [0, 3, 4, 5]),
        ([4, 8, 7, 6, 4, 7, 5, 9], 7, [0, 1, 2, 3, 5, 6, 7, 8]),
        ([2, 1, 1, 2, 1, 0, 2, 0], 6, [0, 1, 2, 3, 4, 6, 8]),
        ([1, 2, 3, 0, 9, 8, 9], 4, [0, 4, 5, 6, 7]),
        ([0, 9, 9, 2, 5, 1, 8, 5, 3], 3, [0, 2, 6, 9]),
        ([2, 1, 2, 2, 1, 1, 0], 3, [0, 2, 4, 7]),
        ([1.5, 2], 4, [0, 1, 2, 2, 2]),
    ],
)
def test_balanced_parts_are_deepspeeds(weights: list[float], parts: int, bounds: list[int]) -> None:
    """What deepspeed 0.19.8 answers."""
    assert runtime_utils.partition_balanced(weights, parts) == bounds


@given(st.lists(st.integers(0, 50) | st.floats(0, 1e6), min_size=1, max_size=12), st.integers(1, 12))
def test_no_balanced_part_is_empty(weights: list[float], parts: int) -> None:
    bounds = runtime_utils.partition_balanced(weights, parts)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(weights), parts + 1)
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert min(lengths) >= (1 if len(weights) >= parts else 0)


@pytest.mark.deepspeed
@given(st.lists(st.integers(0, 50) | st.floats(0, 1e6), min_size=1, max_size=12), st.integers(1, 12))
def test_balanced_parts_against_the_installed_deepspeed(weights: list[float], parts: int) -> None:
    theirs = pytest.importorskip("deepspeed.runtime.utils", reason="needs the extra deepspeed")
    assert runtime_utils.partition_balanced(weights, parts) == theirs.partition_balanced(weights, parts)


@given(st.integers(0, 100), st.integers(1, 12))
def test_uniform_parts(items: int, parts: int) -> None:
    bounds = runtime_utils.partition_uniform(items, parts)
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert sum(lengths) == items
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("norm_type", [1, 2, 3.5, math.inf])
def test_clipping_is_torchs(norm_type: float) -> None:
    ours = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    theirs = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape)
        b.grad = a.grad.clone()
    norm = runtime_utils.clip_grad_norm_(ours, 0.3, norm_type)
    assert norm.allclose(torch.nn.utils.clip_grad_norm_(theirs, 0.3, norm_type))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad)  # type: ignore[arg-type]


def test_the_rest_of_runtime_utils() -> None:
    assert runtime_utils.call_to_str("f", 3, "x", val=1) == "f(3, 'x', val=1)"
    assert runtime_utils.get_only_unique_item([2, 2]) == 2
    with pytest.raises(ConfigError):
        runtime_utils.get_only_unique_item([1, 2])
    assert runtime_utils.get_global_norm([3.0, 4.0]) == 5.0
    moved = runtime_utils.move_to_device({"a": [torch.ones(1), (2, torch.zeros(1))]}, "meta")
    assert moved["a"][1][1].is_meta
    assert moved["a"][1][0] == 2


# ---------------------------------------------------------------- the class of the optimizer


def _class(config: dict[str, Any], client: str | None) -> list[bool]:
    model = nn.Linear(3, 2)
    own = getattr(torch.optim, client)(model.parameters()) if client else None
    kind = {} if own else {"optimizer": {"type": "Adam"}}
    engine, optimizer, _, _ = xtrain.initialize(
        model=model, optimizer=own, config={"train_batch_size": 1, "log_level": "error", **kind, **config}
    )
    x = torch.ones(1, 3, dtype=engine.module.weight.dtype)
    before = engine.module.weight.detach().clone()
    engine.backward(engine(x).sum())
    engine.step()
    assert not engine.module.weight.equal(before)
    kinds = (FP16_Optimizer, FP16_UnfusedOptimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3)
    classes = (*kinds, xtrain.ops.adam.FusedAdam, torch.optim.AdamW)
    return [isinstance(optimizer, cls) for cls in classes] + [own is not None and optimizer == own]


@pytest.mark.parametrize(
    ("config", "client", "expected"),
    [
        ({}, None, "000010 0"),
        ({}, "AdamW", "000001 1"),
        ({"bf16": {"enabled": True}}, None, "100000 0"),
        ({"bf16": {"enabled": True}}, "AdamW", "010000 0"),
        ({"zero_optimization": {"stage": 1}}, "AdamW", "001000 0"),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, None, "000100 0"),
    ],
)
def test_scripts_can_ask_which_optimizer_they_got(
    ranks: Callable[..., list[Any]], config: dict[str, Any], client: str | None, expected: str
) -> None:
    (found,) = ranks(1, _class, config, client)
    assert found == [flag == "1" for flag in expected.replace(" ", "")]


def test_which_optimizers_may_be_divided() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    assert is_zero_supported_optimizer(torch.optim.AdamW(params))
    assert not is_zero_supported_optimizer(torch.optim.LBFGS(params))


# ---------------------------------------------------------------- errors as DeepSpeed raises them


def _errors() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="model="):
        xtrain.initialize(model=None, config={"train_batch_size": 1})
    engine, *_ = xtrain.initialize(
        model=model, config={"train_batch_size": 1, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}}
    )
    with (
        engine.no_sync(),
        pytest.raises(AssertionError, match="reentry"),
        engine.no_sync(),
    ):
        pass
    with pytest.raises(AssertionError, match="no gradient has arrived"):
        engine.step()


def test_mistakes_are_assertion_errors_too(ranks: Callable[..., list[Any]]) -> None:
    ranks(1, _errors)


# ---------------------------------------------------------------- gradients of a script's own


def _assigned(stage: int, half: str | None) -> list[float]:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "zero_optimization": {"stage": stage},
        **({half: {"enabled": True}} if half else {}),
    }
    if half == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 2.0}
    engine, *_ = xtrain.initialize(model=model, config=config)
    rank = xtrain.comm.get_rank()
    for step in range(2):
        engine.module.weight.grad = torch.full_like(engine.module.weight, float(rank + step))
        engine.step()
    with pytest.raises(ConfigError, match="no gradient"):
        engine.step()
    return engine.module.weight.detach().float().flatten().tolist()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("half", [None, "fp16"])
def test_gradients_that_a_script_assigns_are_averaged_and_applied(
    ranks: Callable[..., list[Any]], stage: int, half: str | None
) -> None:
    # Ranks give 0 and 1, then 1 and 2: the means are 0.5 and 1.5.
    total = 2.0 / (2.0 if half else 1.0)
    assert ranks(2, _assigned, stage, half) == [[1.0 - total] * 4] * 2
