"""`deepspeed.runtime.fp16.loss_scaler`: the classes of `engine.optimizer.loss_scaler`."""

from xtrain.precision.loss_scale import DynamicLossScale as DynamicLossScaler
from xtrain.precision.loss_scale import LossScale as LossScalerBase

LossScaler = LossScalerBase

__all__ = ["DynamicLossScaler", "LossScaler", "LossScalerBase"]
