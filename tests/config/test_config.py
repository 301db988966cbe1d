"""Reading the configuration: what is accepted, refused or reported, and how mistakes are told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.config import load_config, solve_batch_sizes
from xtrain.config.document import descriptions, document, purpose
from xtrain.config.rules import NoEffect, NotYet, Section
from xtrain.config.schema import Config
from xtrain.config.unknown import keys

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"train_batch_siz": 8}, "unknown key 'train_batch_siz': did you mean 'train_batch_size'?"),
        (
            {"zero_optimization": {"stge": 1}},
            "unknown key 'stge' in section 'zero_optimization': did you mean 'stage'?",
        ),
        ({"stage": 1}, "the key is 'zero_optimization.stage'"),
        ({"zero_optimization": {"gradient_clipping": 1.0}}, "the key is 'gradient_clipping'"),
        ({"zero_optimization": {"qwertyuiop": 1}}, "see docs/config.md"),
        ({"xtrain": {"qwertyuiop": 1}}, "see docs/config.md"),
        (
            {"qwertyuiop": 1, "xtrain": {"strict": True}},
            "unknown key 'qwertyuiop': remove it, or see docs/config.md",
        ),
        ({"flops_profiler": {"qwertyuiop": 1}, "xtrain": {"strict": True}}, "see docs/config.md"),
        ({"zero_optimization.stage": 1, "xtrain": {"strict": True}}, "unknown key 'zero_optimization.stage'"),
        ({"train_micro_batch_size": 1}, "did you mean 'train_micro_batch_size_per_gpu'?"),
        ({"batch_size": 1}, "did you mean 'train_batch_size'?"),
        ({"fp61": {"enabled": True}}, "did you mean 'fp16'?"),
        ({"fp16_enabled": True}, "the key is 'fp16.enabled'"),
        ({"zero_optimization_stage": 2}, "did you mean 'zero_optimization'?"),
        ({"flops_profiler": {"gradient_clipping": 1.0}}, "the key is 'gradient_clipping'"),
        ({"flops_profiler": {"profile_stp": 1}}, "did you mean 'profile_step'?"),
        ({"optimizer": {"type": "Adam", "lr": 1}}, "options of the optimizer belong in 'optimizer.params'"),
        ({"scheduler": {"type": "WarmupLR", "warmup_num_steps": 1}}, "belong in 'scheduler.params'"),
        ({1: 2}, "the key 1 must be a string"),
        ({"optimizer": {"params": {"lr": 1}}}, "'optimizer.type' is missing"),
        ({"gradient_clipping": "high"}, "'gradient_clipping' is 'high'"),
        ({"gradient_clipping": -1}, "'gradient_clipping' is -1"),
        ({"zero_optimization": {"stage": 7}}, "'zero_optimization.stage' is 7"),
    ],
)
def test_mistakes_name_the_key_and_what_to_do(config: dict[Any, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": True, "auto_cast": True}},
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
        {"data_efficiency": {"enabled": True}},
        {"autotuning": {"enabled": True}},
        {"tensor_parallel": {"autotp_size": 2}},
        {"zero_optimization": {"stage": 3, "mics_shard_size": 8}},
        {"compile": {"deepcompile": True}},
        {"compile": {"backend": "inductor"}},
        {"graph_harvesting": True},
        {"compression_training": {"pruning": {"shared_parameters": {"enabled": True}}}},
        {"weight_quantization": {"quantized_initialization": {"num_bits": 8}}},
    ],
)
def test_features_not_there_yet_are_refused_by_name(config: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedYetError) as caught:
        load_config(config)
    key = next(iter(config))
    assert key in str(caught.value)
    assert "not there yet" in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"fp16": {"enabled": False, "loss_scale_window": 500}},
        {"flops_profiler": {"enabled": False}, "tensorboard": {}},
        {"zero_optimization": {"stage": 1, "overlap_comm": True, "offload_param": None}},
        {"prescale_gradients": False, "gradient_predivide_factor": 1.0},
        {"bfloat16": {"enabled": True}},
        {"zero_optimization": {"cpu_offload": False, "offload_optimizer": {"device": "none"}}},
        {"activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False}},
        {"fp16": {"enabled": False, "auto_cast": True}, "communication_data_type": "fp32"},
        {"zero_optimization": True},
        {"tensor_parallel": {"autotp_size": 1}},
        {"optimizer": {}, "scheduler": {"type": None, "params": None}, "bf16": None},
        {"datastates_ckpt": False, "expert_parallel": False},
        {"tensor_parallel": {"autotp_size": 0, "preset_model": "llama", "tp": {"tp_size": 1}}},
        {"data_efficiency": {"seed": 1234, "data_routing": {"enabled": False, "random_ltd": {"x": 1}}}},
        {"autotuning": {"fast": True}, "hybrid_engine": {"enabled": "auto", "max_out_tokens": 512}},
        {"elasticity": {"enabled": False, "max_train_batch_size": 2000}, "amp": {"opt_level": "O1"}},
        {"compression_training": {"pruning": {"shared_parameters": {"enabled": False}, "groups": {"g": 1}}}},
        {"weight_quantization": {"enabled": True, "quantized_initialization": {}}},
        {"zero_optimization": {"stage": 3, "mics_shard_size": -1, "zeropp_loco_param": None}},
        {"compile": {"disable": False}, "graph_harvesting": False, "checkpoint": {"writer": {}}},
        {"zero_optimization": {"stage": 1, "load_from_fp32_weights": False}},
        {"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}},
        {"torch_autocast": {"dtype": "half"}, "data_types": {"grad_accum_dtype": "torch.float32"}},
    ],
)
def test_features_that_are_off_are_accepted_in_silence(config: dict[str, Any]) -> None:
    assert load_config(config).notices == []


def test_features_of_stage_3_are_not_missed_below_it() -> None:
    for key, value in (("zero_hpz_partition_size", 8), ("zero_quantized_weights", True)):
        (notice,) = load_config({"zero_optimization": {"stage": 2, key: value}}).notices
        assert f"'zero_optimization.{key}' has no effect: it is only read in ZeRO stage 3" in notice
        with pytest.raises(NotImplementedYetError):
            load_config({"zero_optimization": {"stage": 3, key: value}})


def test_keys_without_effect_are_reported() -> None:
    notices = load_config(
        {"zero_optimization": {"stage3_max_live_parameters": 5, "contiguous_gradients": False}}
    ).notices
    assert len(notices) == 2
    assert "zero_optimization.stage3_max_live_parameters" in notices[1]
    assert all("no effect: " in notice for notice in notices)


def test_infinitely_many_steps_between_prints_is_never() -> None:
    assert (
        load_config({"train_batch_size": 1, "steps_per_print": float("inf")}).values.steps_per_print is None
    )


def test_auto_means_left_out() -> None:
    values = load_config(
        {"train_batch_size": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}}
    ).values
    assert values.train_batch_size is None
    assert values.zero_optimization.reduce_bucket_size is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: Any, said: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.json")


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 16))
def test_batch_sizes_derive_from_any_two(micro: int, accumulation: int, ranks: int) -> None:
    train = micro * accumulation * ranks
    expected = (train, micro, accumulation)
    assert solve_batch_sizes(train, micro, None, ranks) == expected
    assert solve_batch_sizes(train, None, accumulation, ranks) == expected
    assert solve_batch_sizes(None, micro, accumulation, ranks) == expected
    assert solve_batch_sizes(train, micro, accumulation, ranks) == expected


@given(st.integers(1, 100), st.integers(1, 10), st.integers(1, 10))
def test_a_remainder_is_an_error(train: int, micro: int, ranks: int) -> None:
    if train % (micro * ranks):
        with pytest.raises(ConfigError, match=f"not divisible by .* = {micro * ranks}"):
            solve_batch_sizes(train, micro, None, ranks)
    else:
        assert solve_batch_sizes(train, micro, None, ranks).accumulation == train // (micro * ranks)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ((None, None, None, 2), "neither"),
        ((8, 2, 3, 2), "leave one of the three out"),
        ((0, None, None, 1), "at least 1"),
    ],
)
def test_batch_size_mistakes(given_: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        solve_batch_sizes(*given_)


def test_the_reference_page_is_current() -> None:
    assert (DOCS / "config.md").read_text() == document(), "run `make docs`"


def _every_section(model: type[Section]) -> Iterator[type[Section]]:
    yield model
    for info in model.model_fields.values():
        for candidate in (info.annotation, *get_args(info.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                yield from _every_section(candidate)


def test_every_key_says_what_it_does() -> None:
    for model in _every_section(Config):
        told = descriptions(model)
        for name, info in model.model_fields.items():
            is_section = any(
                isinstance(candidate, type) and issubclass(candidate, Section)
                for candidate in (info.annotation, *get_args(info.annotation))
            )
            text = told.get(name, "")
            assert is_section or text.endswith((".", ".)")), f"{model.__name__}.{name} has no text below it"
        assert purpose(model).endswith((".", ".)")), model.__name__


def test_what_a_key_means_that_is_not_there_is_deepspeeds() -> None:
    """Its text must not read as if xtrain did it."""
    for model in _every_section(Config):
        told = descriptions(model)
        for name, info in model.model_fields.items():
            if any(isinstance(mark, NotYet | NoEffect) for mark in info.metadata) and name != "format":
                assert re.match(r"In (old versions of )?DeepSpeed", told[name]), f"{model.__name__}.{name}"


@pytest.mark.deepspeed
def test_every_deepspeed_zero_key_is_known() -> None:
    """Against the installed DeepSpeed's own model: nothing a user may write is unknown here."""
    zero = pytest.importorskip("deepspeed.runtime.zero.config", reason="needs the extra deepspeed")
    ours = set(keys(Config.model_fields["zero_optimization"].annotation)) | set(
        Config.model_fields["zero_optimization"].annotation.model_fields
    )
    theirs = zero.DeepSpeedZeroConfig.model_fields
    assert {info.alias or name for name, info in theirs.items()} - ours == set()
