"""`deepspeed.accelerator.real_accelerator`: another path to the same functions."""

from xtrain.deepspeed_engine.facade import get_accelerator, is_current_accelerator_supported

__all__ = ["get_accelerator", "is_current_accelerator_supported"]
