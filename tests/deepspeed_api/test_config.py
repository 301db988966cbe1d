"""DeepSpeedConfig next to the real one, and configs packed as base64."""

from __future__ import annotations

import argparse
import base64
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import training
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.config import load_config
from xtrain.runtime.config import DeepSpeedConfig

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"train_batch_size": 8},
    "micro": {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "steps_per_print": 7},
    "full": {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.5,
        "prescale_gradients": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16"},
        "activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
        "checkpoint": {"tag_validation": "Fail"},
    },
    "fp16": {
        "train_batch_size": 8,
        "fp16": {"enabled": True, "loss_scale": 64, "initial_scale_power": 3},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": True,
        "gradient_allreduce_op": "SUM",
        "disable_python_gc": True,
    },
}  # fmt: skip


def _pack(config: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(config).encode()).decode()


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", CONFIGS)
def test_attributes_are_deepspeeds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    theirs_module = pytest.importorskip("deepspeed.runtime.config", reason="needs the extra deepspeed")
    config = {**CONFIGS[name]}
    if isinstance(
        config.get("zero_optimization"), bool
    ):  # older DeepSpeed's spelling, which ours still reads
        theirs = theirs_module.DeepSpeedConfig({**config, "zero_optimization": {"stage": 1}})
    else:
        theirs = theirs_module.DeepSpeedConfig(config)
    ours = xtrain.DeepSpeedConfig(config)
    compared = 0
    for key, expected in vars(theirs).items():
        plain = expected is None or isinstance(expected, int | float | str | dict | list | torch.dtype)
        if hasattr(ours, key) and plain and not key.startswith(("_", "zero_config", "checkpoint_config")):
            assert getattr(ours, key) == expected, key
            compared += 1
    assert compared > 30
    assert ours.zero_config.stage == theirs.zero_config.stage
    for key in ("partition_activations", "number_checkpoints", "cpu_checkpointing", "profile"):
        expected = getattr(theirs.activation_checkpointing_config, key)
        assert getattr(ours.activation_checkpointing_config, key) == expected
    assert ours.float16_config.loss_scale == theirs.float16_config.loss_scale


class Unit:
    def get_data_parallel_world_size(self) -> int:
        return 4


def test_scripts_find_it_where_deepspeed_has_it() -> None:
    assert "runtime" in dir(xtrain)
    assert xtrain.runtime.config.DeepSpeedConfig is xtrain.DeepSpeedConfig


def test_batch_sizes_follow_the_mpu(caplog: pytest.LogCaptureFixture) -> None:
    config = DeepSpeedConfig({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}, Unit())
    assert (config.world_size, config.gradient_accumulation_steps) == (4, 2)
    assert config.fp16_enabled is False
    with pytest.raises(ConfigError, match="not divisible"):
        DeepSpeedConfig({"train_batch_size": 3}, Unit())
    with pytest.raises(NotImplementedYetError, match="mesh_device"):
        DeepSpeedConfig({"train_batch_size": 3}, mesh_device=object())
    caplog.set_level(logging.INFO, logger="xtrain")
    config.print("settings")
    assert "settings:" in caplog.messages
    assert "  train_batch_size = 16" in caplog.messages


def test_a_config_can_be_packed_as_base64(tmp_path: Path) -> None:
    for config in CONFIGS.values():
        packed = load_config(_pack(config))
        assert packed.values == load_config(config).values
        assert packed.source == "base64 config"
    assert DeepSpeedConfig(_pack(CONFIGS["small"])).train_batch_size == 8
    path = tmp_path / "config"
    path.write_text(json.dumps(CONFIGS["small"]))
    assert load_config(str(path)).source == str(path)
    with pytest.raises(ConfigError, match="base64 config: unknown key 'train_batch_sise'"):
        load_config(_pack({"train_batch_sise": 4}))
    with pytest.raises(ConfigError, match="base64 config is not valid JSON"):
        load_config(base64.urlsafe_b64encode(b'{"train_batch_size": 4,}').decode())
    for wrong in ("dsconfig", "ds_config.json", "AAAA", "{}", "x" * 5000, ""):
        with pytest.raises(ConfigError):
            load_config(wrong)


def _from_arguments() -> int:
    parser = xtrain.add_config_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--deepspeed_config", _pack(training.config(1))])
    engine = xtrain.initialize(args=args, model=training.build_model())[0]
    training.engine_step(engine, 0)
    return engine.zero_optimization_stage()


def test_the_argument_of_a_script_may_be_base64(ranks: Any) -> None:
    assert ranks(2, _from_arguments) == [1, 1]
