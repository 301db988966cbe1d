"""`deepspeed.accelerator.abstract_accelerator`: another path to the same class."""

from xtrain.deepspeed_engine.facade import Accelerator as DeepSpeedAccelerator

__all__ = ["DeepSpeedAccelerator"]
