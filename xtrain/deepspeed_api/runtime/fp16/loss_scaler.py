"""`deepspeed.runtime.fp16.loss_scaler`: the classes of `engine.optimizer.loss_scaler`."""

from xtrain.base.stand_ins import refused_class
from xtrain.precision.loss_scale import DynamicLossScale as DynamicLossScaler
from xtrain.precision.loss_scale import LossScale as LossScalerBase

LossScaler = LossScalerBase
LossScaleConfig = refused_class("runtime.fp16.loss_scaler.LossScaleConfig")
LossScaleProfile = refused_class("runtime.fp16.loss_scaler.LossScaleProfile")

__all__ = ["DynamicLossScaler", "LossScaleConfig", "LossScaleProfile", "LossScaler", "LossScalerBase"]
