"""`deepspeed.accelerator`: the chip under DeepSpeed's method names, answered by the backend's facets."""

from xtrain.deepspeed_engine.facade import Accelerator, get_accelerator, is_current_accelerator_supported

DeepSpeedAccelerator = Accelerator

__all__ = ["Accelerator", "DeepSpeedAccelerator", "get_accelerator", "is_current_accelerator_supported"]
