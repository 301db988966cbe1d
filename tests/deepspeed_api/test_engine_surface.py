"""The engine's public methods: which of DeepSpeed's there are, and what they answer and do."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from tests.engine.test_corners import _engine
from xtrain.base.errors import CheckpointError, ConfigError, NotImplementedYetError
from xtrain.deepspeed_api.engine_settings import EngineSettings
from xtrain.runtime.engine import XtrainEngine

INTERNAL = {
    # How DeepSpeed reduces gradients, sparse ones included.
    "all_gather_scalar", "allreduce_and_copy", "allreduce_bucket", "allreduce_no_retain", "sparse_all_gather",
    "buffered_allreduce_fallback", "sparse_allreduce", "sparse_allreduce_bucket", "sparse_allreduce_no_retain",
    # Parts of its own compiler.
    "compile_autosp", "compile_autotp", "compile_zero_optimization_stage", "get_autosp_backend",
    "get_autotp_backend", "get_deepcompile_backend", "get_deepspeed_compile_backend",
    "uses_parallelization_pass_only",
    # Settings of sections that xtrain refuses (tuning, data efficiency, offload, tensor parallelism).
    "autotp_size", "autotuning_end_profile_step", "autotuning_metric", "autotuning_metric_path",
    "autotuning_model_info_path", "autotuning_profile_model_info", "autotuning_start_profile_step",
    "checkpoint_serialization_enabled", "checkpoint_writer_enabled", "cpuadam_cores_perc",
    "curriculum_learning_config", "data_sampling_config", "data_sampling_enabled", "print_forward_breakdown",
    "random_ltd_config", "super_offload", "swap_tensor_config", "zero_nvme_offload_optimizer",
    "zero_partial_offload", "zero_use_cpu_optimizer",
    # How its optimizer is put together.
    "get_optimizer_configuration", "is_first_weights_partition_group", "is_iterable_style_dataset",
    "is_map_style_dataset",
}  # fmt: skip


@pytest.mark.deepspeed
def test_deepspeeds_public_methods_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    theirs = pytest.importorskip(
        "deepspeed.runtime.engine", reason="needs the extra deepspeed"
    ).DeepSpeedEngine
    names = {name for name in vars(theirs) if not name.startswith("_")}
    missing = {name for name in names if not hasattr(XtrainEngine, name)}
    assert missing - INTERNAL == set()
    assert INTERNAL - missing == set(), "no longer missing"
    for name in sorted(names - missing):
        ours = inspect.getattr_static(XtrainEngine, name)
        expected = inspect.getattr_static(theirs, name)
        assert isinstance(ours, property) == isinstance(expected, property), name
        if not callable(ours) or ours.__qualname__.startswith(("_not_yet", "_key", "_enabled")):
            continue
        parameters = inspect.signature(ours).parameters
        for parameter in list(inspect.signature(expected).parameters)[1:]:
            if parameter not in ("args", "kwargs"):  # of a decorator
                assert parameter in parameters, f"{name}({parameter})"


def _answers() -> dict[str, Any]:
    settings = training.config(
        2,
        micro=4,
        gradient_clipping=0.25,
        steps_per_print=9,
        data_types={"grad_accum_dtype": "fp32"},
        bf16=True,
    )
    engine = xtrain.initialize(model=training.build_model(), config=settings)[0]
    answers: dict[str, Any] = {}
    for name, getter in vars(EngineSettings).items():
        if callable(getter) and not name.startswith("_"):
            answers[name] = getattr(engine, name)()
    for name in ("get_mom", "get_type", "optimizer_name", "get_data_parallel_rank", "get_model_parallel_rank",
                 "get_tensor_parallel_rank", "get_sequence_parallel_group", "random_ltd_enabled",
                 "is_deepcompile_active", "get_batch_info"):  # fmt: skip
        answers[name] = getattr(engine, name)()
    for name in (
        "mp_world_size",
        "dp_world_size",
        "communication_data_type",
        "is_compiled",
        "has_moe_layers",
    ):
        answers[name] = getattr(engine, name)
    answers["group"] = engine.data_parallel_group is not None
    answers["names"] = sorted(engine.param_names.values())
    with pytest.raises(NotImplementedYetError):
        engine.communication_data_type = torch.float16
    return answers


def test_what_the_getters_answer(ranks: Any) -> None:
    first, second = ranks(2, _answers)
    assert (first["get_data_parallel_rank"], second["get_data_parallel_rank"]) == (0, 1)
    expected = {
        "gradient_clipping": 0.25, "steps_per_print": 9, "bfloat16_enabled": True, "fp16_enabled": False,
        "zero_optimization_stage": 2, "zero_optimization": True, "zero_optimization_partition_gradients": True,
        "zero_optimization_partition_weights": False, "zero_reduce_bucket_size": 150, "zero_cpu_offload": False,
        "get_data_types": (torch.bfloat16, torch.float32), "communication_data_type": torch.float32,
        "initial_dynamic_scale": 65536.0, "optimizer_name": "adamw", "scheduler_name": "WarmupDecayLR",
        "get_mom": [[0.9, 0.95]], "get_type": [0.0], "mp_world_size": 1, "dp_world_size": 2, "is_compiled": False,
        "get_model_parallel_rank": 0, "get_tensor_parallel_rank": 0, "get_sequence_parallel_group": None,
        "torch_autocast_dtype": None, "managed_gradient_accumulation": True, "zero_compute_grad_norm": True,
        "postscale_gradients": True, "amp_enabled": False, "flops_profiler_enabled": False, "group": True,
        "checkpoint_tag_validation_enabled": True, "checkpoint_tag_validation_fail": False, "dump_state": False,
        "get_batch_info": (16, 4, 2), "random_ltd_enabled": False, "is_deepcompile_enabled": False,
        "names": ["first.bias", "first.weight", "second.bias", "second.weight"],
    }  # fmt: skip
    for name, value in expected.items():
        answer = first[name]
        assert ([list(item) for item in answer] if name == "get_mom" else answer) == value, name
    assert first["dynamic_loss_scale_args"]["scale_window"] == 1000
    assert len(first) > 80


def _client() -> tuple[str, list[Any], str | None]:
    model = toys.Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.75)
    engine = xtrain.initialize(
        model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 1}
    )[0]
    bare = xtrain.initialize(model=toys.Weight(), config={"train_micro_batch_size_per_gpu": 1})[0]
    return engine.optimizer_name(), engine.get_mom(), bare.optimizer_name()


def test_the_scripts_own_optimizer_is_named_by_its_class(ranks: Any) -> None:
    assert ranks(1, _client)[0] == ("SGD", [0.75], None)


@pytest.mark.parametrize(
    "name",
    ["clip_fp32_gradients", "get_compile_time",
     "set_data_post_process_func", "random_ltd_initialize", "load_moe_state_dict"],
)  # fmt: skip
def test_what_is_not_there_says_what_to_use(name: str) -> None:
    with pytest.raises(NotImplementedYetError, match=rf"engine\.{name}\(\) is not there yet in xtrain: \w+"):
        getattr(XtrainEngine, name)(None)


def _micro_batches() -> list[Any]:
    engine = _engine(toys.Weight(), accumulation=2)
    seen: list[Any] = [engine.get_batch_info()]
    engine.set_train_micro_batch_size(3)
    seen.append(engine.get_batch_info())
    engine.backward(engine(1.0))
    engine.step()
    with pytest.raises(ConfigError, match="middle of an accumulation window"):
        engine.set_train_micro_batch_size(1)
    return seen


def test_the_micro_batch_can_change(ranks: Any) -> None:
    assert ranks(2, _micro_batches)[0] == [(4, 1, 2), (12, 3, 2)]


def _allreduce(stage: int) -> tuple[list[float], list[float], list[float]]:
    model = toys.Weight()
    engine = _engine(model, stage)
    engine(float(1 + engine.grid.rank)).backward()
    before = [] if model.weight.grad is None else model.weight.grad.tolist()
    engine.allreduce_gradients()
    after = [] if model.weight.grad is None else model.weight.grad.tolist()
    engine.allreduce_gradients()
    engine.step()
    return before, after, model.weight.tolist()


def test_gradients_can_be_reduced_before_the_step(ranks: Any) -> None:
    before, after, weights = ranks(2, _allreduce, 0)[1]
    assert (before, after, weights) == ([2.0] * 4, [1.5] * 4, [-1.5] * 4)
    for stage in (1, 2):
        assert ranks(2, _allreduce, stage)[1][2] == [-1.5] * 4


def _compiled(stage: int, backend: str | None) -> tuple[list[float], bool]:
    engine = xtrain.initialize(model=training.build_model(), config=training.config(stage, micro=8))[0]
    if backend is not None:
        engine.compile(backend=backend, compile_kwargs={"dynamic": False, "backend": "inductor"})
        engine.compile()  # the second call does nothing
    return [training.engine_step(engine, step) for step in range(4)], engine.is_compiled


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_compiled_module_trains_the_same(ranks: Any, stage: int) -> None:
    plain, compiled = ranks(2, _compiled, stage, None)[0]
    assert compiled is False
    for backend in ("eager", "aot_eager"):
        losses, compiled = ranks(2, _compiled, stage, backend)[0]
        assert losses == pytest.approx(plain, rel=1e-6)
        assert compiled is True


def _compile_mistakes() -> list[str]:
    said = []
    for settings, kwargs in (
        ({"xtrain": {"aligned": True}}, {}),
        ({}, {"schedule": []}),
        ({}, {"compiled_autograd_enabled": True}),
    ):
        engine = _engine(toys.Weight(), **settings)
        with pytest.raises((ConfigError, NotImplementedYetError)) as caught:
            engine.compile(**kwargs)
        said.append(str(caught.value))
    return said


def test_compile_says_what_it_cannot(ranks: Any) -> None:
    aligned, schedule, autograd = ranks(1, _compile_mistakes)[0]
    assert "aligned mode" in aligned
    assert "DeepCompile" in schedule
    assert "compiled_autograd_enabled" in autograd


def _save(folder: str, stage: int, bf16: bool) -> dict[str, torch.Tensor]:
    model = toys.Tied(8, bias=True)
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model.register_buffer("count", torch.arange(3))
    engine = _engine(model, stage, bf16={"enabled": bf16})
    assert engine.save_16bit_model(f"{folder}/deep/er") is True
    assert engine.save_fp16_model(folder, "other.bin") is True
    assert engine.save_16bit_model(folder, "thin.bin", exclude_frozen_parameters=True) is True
    (Path(folder) / "file").touch()
    xtrain.comm.barrier()
    with pytest.raises(CheckpointError, match="writing"):
        engine.save_16bit_model(f"{folder}/file")
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 2])
def test_plain_weights_are_one_file(ranks: Any, tmp_path: Path, stage: int, bf16: bool) -> None:
    expected = ranks(2, _save, str(tmp_path), stage, bf16)[0]
    path = tmp_path / "deep" / "er" / "pytorch_model.bin"
    for file in (path, tmp_path / "other.bin"):
        state = torch.load(file, weights_only=True)
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        assert state["first.weight"].dtype == (torch.bfloat16 if bf16 else torch.float32)
        assert state["first.weight"].data_ptr() == state["second.weight"].data_ptr()
    assert "frozen" not in torch.load(tmp_path / "thin.bin", weights_only=True)
    assert path.stat().st_size < 4000  # one copy of the tied weight, and no flat buffer
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "file", "other.bin", "thin.bin"]
