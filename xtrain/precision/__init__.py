"""Which dtype computes, in which dtype gradients travel, and how fp16 losses are scaled."""

from xtrain.precision.autocast import autocast_region
from xtrain.precision.loss_scale import DynamicLossScale, LossScale, make_loss_scale
from xtrain.precision.policy import PrecisionPolicy, for_backend, make_policy

__all__ = [
    "DynamicLossScale",
    "LossScale",
    "PrecisionPolicy",
    "autocast_region",
    "for_backend",
    "make_loss_scale",
    "make_policy",
]
