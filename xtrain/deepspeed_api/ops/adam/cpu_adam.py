"""`deepspeed.ops.adam.cpu_adam`: another path to the same class."""

from xtrain.ops.adam import DeepSpeedCPUAdam

__all__ = ["DeepSpeedCPUAdam"]
