"""`deepspeed.runtime.fp16.loss_scaler`: the classes of `engine.optimizer.loss_scaler`."""

from typing import Any

import torch

from xtrain.base.stand_ins import refused_class
from xtrain.precision.loss_scale import DynamicLossScale as DynamicLossScaler
from xtrain.precision.loss_scale import LossScale as LossScalerBase

LossScaler = LossScalerBase
LossScaleConfig = refused_class("runtime.fp16.loss_scaler.LossScaleConfig")
LossScaleProfile = refused_class("runtime.fp16.loss_scaler.LossScaleProfile")


def CreateLossScaler(
    dtype: torch.dtype,
    static_loss_scale: float,
    dynamic_scaling: bool,
    dynamic_loss_args: dict[str, Any] | None,
) -> LossScalerBase:
    """The loss scale for gradients of a dtype: 1 unless that is float16.

    Args:
        dynamic_loss_args: `init_scale`, `scale_window`, `delayed_shift`, `consecutive_hysteresis`, `min_scale` and
            `raise_error_at_min_scale`, as in DeepSpeed; None for its defaults.
    """
    if dtype != torch.float16:
        return LossScalerBase(1.0)
    if not dynamic_scaling:
        return LossScalerBase(static_loss_scale)
    given = dynamic_loss_args or {}
    return DynamicLossScaler(
        given.get("init_scale", 2**32),
        given.get("scale_window", 1000),
        given.get("delayed_shift", 1),
        given.get("consecutive_hysteresis", False),
        given.get("min_scale", 1),
        given.get("raise_error_at_min_scale", True),
    )


__all__ = [
    "CreateLossScaler",
    "DynamicLossScaler",
    "LossScaleConfig",
    "LossScaleProfile",
    "LossScaler",
    "LossScalerBase",
]
