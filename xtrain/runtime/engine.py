"""`deepspeed.runtime.engine`: the engine under DeepSpeed's name."""

from xtrain.engine import XtrainEngine as DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
