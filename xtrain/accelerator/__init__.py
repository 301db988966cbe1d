"""`deepspeed.accelerator`: the chip under DeepSpeed's method names, answered by the backend's facets."""

from xtrain.accelerator.facade import Accelerator, get_accelerator
from xtrain.backends import host_memory

DeepSpeedAccelerator = Accelerator

__all__ = ["Accelerator", "DeepSpeedAccelerator", "get_accelerator", "host_memory"]
