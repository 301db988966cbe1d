"""`deepspeed.runtime.precision_config`: the sections `fp16` and `bf16` of a config, checked on their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.config.rules import drop_auto
from xtrain.config.schema import Bf16Config as DeepSpeedBF16Config
from xtrain.config.schema import Fp16Config as DeepSpeedFP16Config


def get_float16_config(param_dict: Mapping[str, Any]) -> DeepSpeedFP16Config:
    """The section `fp16` of a config; the defaults where there is none."""
    return DeepSpeedFP16Config.model_validate(drop_auto(param_dict.get("fp16", {})))


def get_bfloat16_config(param_dict: Mapping[str, Any]) -> DeepSpeedBF16Config:
    """The section `bf16` of a config, or `bfloat16`; the defaults where there is none."""
    section = param_dict.get("bf16", param_dict.get("bfloat16", {}))
    return DeepSpeedBF16Config.model_validate(drop_auto(section))


__all__ = ["DeepSpeedBF16Config", "DeepSpeedFP16Config", "get_bfloat16_config", "get_float16_config"]
