"""What other projects write into their DeepSpeed configurations, in configurations of our own."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_api import public_configs
from xtrain.base.errors import NotImplementedYetError
from xtrain.config import load_config

_AUTO = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}


def test_everything_was_accepted_or_refused_for_a_feature() -> None:
    for row in json.loads(public_configs.COUNTS.read_text()):
        assert row["wrong"] == {}
        assert row["configurations"] == row["accepted"] + sum(row["refused"].values()) > 0


@pytest.mark.parametrize(
    "config",
    [
        # what a Trainer fills in
        {**_AUTO, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 3, "sub_group_size": 1e9}},
        {
            "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
            "bf16": {"enabled": True},
        },
        # what DeepSpeed does not read
        {**_AUTO, "_comment": "a link", "comms_config": {"verbose": False}},
        {"train_batch_size": 8, "cuda_visible_devices": 0, "monitor_config": {"csv_monitor": {}}},
        {"zero_optimization": {"stage": 3}, "zero_optimization.stage3_prefetch_bucket_size": 530841.6},
        # features that are off
        {"compile": {"deepcompile": False}, "tensor_parallel": {"autotp_size": 1}},
        {"data_types": {"grad_accum_dtype": None}, "checkpoint": {"load_universal": True}},
        {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8, "zero_quantized_weights": False}},
        {"amp": {"enabled": "auto", "opt_level": "auto"}, "autotuning": {"enabled": False}},
        # spellings
        {"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}},
        {"zero_optimization": {"stage": 2, "gather_16bit_weights_on_model_save": True, "cpu_offload": False}},
    ],
)
def test_accepted(config: dict[str, Any]) -> None:
    load_config(config)


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "'tensor_parallel'"),
        ({"compile": {"disable": False, "backend": "inductor"}}, "'compile.backend'"),
        ({"compile": {"deepcompile": True}}, "'compile.deepcompile'"),
        ({"data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}}}, "'data_efficiency'"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"sparse_attention": {"mode": "fixed", "block": 16}}, "'sparse_attention'"),
    ],
)
def test_refused_for_a_feature_that_is_named(config: dict[str, Any], feature: str) -> None:
    with pytest.raises(NotImplementedYetError, match=feature):
        load_config(config)


def test_the_count_reads_files_and_templates(tmp_path: Path) -> None:
    files = {
        "a.json": '{"train_batch_size": 8}',
        "b/ds_TEMPLATE.json": '{"train_batch_size": BATCH_SIZE, "fp16": {"enabled": FP16_ON}}',
        "c.json.template": '{ {% if fp16 %} "fp16": {"enabled": true}, {% else %} "bf16": {}, {% endif %}'
        ' "zero_optimization": {"stage": {{ stage }}, "cpu_offload": ${offload}}}',
        "d.json": '{"steps_per_print": 1, "tensor_parallel": {"autotp_size": 2}}',
        "e.json": '{"zero_optimization": {"stage": 9}, "nobody": 1}',
        "f.json": '{"zero_optimization": {"stage": 1}, "nobody": 1}',
        "model.json": '{"hidden_size": 8}',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    found = public_configs.count("some/where", str(tmp_path))
    assert {key: found[key] for key in ("configurations", "accepted", "with_ignored_keys", "refused")} == {
        "configurations": 6,
        "accepted": 4,
        "with_ignored_keys": 1,
        "refused": {"tensor_parallel": 1},
    }
    assert "'zero_optimization.stage' is 9" in next(iter(found["wrong"]))
