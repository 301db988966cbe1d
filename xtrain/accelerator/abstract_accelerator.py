"""`deepspeed.accelerator.abstract_accelerator`: another path to the same class."""

from xtrain.accelerator.facade import Accelerator as DeepSpeedAccelerator

__all__ = ["DeepSpeedAccelerator"]
