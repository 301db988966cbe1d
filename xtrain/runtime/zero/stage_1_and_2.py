"""`deepspeed.runtime.zero.stage_1_and_2`: the optimizer under DeepSpeed's name."""

from xtrain.zero.optimizer import ZeroOptimizer as DeepSpeedZeroOptimizer

__all__ = ["DeepSpeedZeroOptimizer"]
