"""`deepspeed.runtime.fp16.unfused_optimizer`: for `isinstance(engine.optimizer, ...)`."""

from xtrain.deepspeed_api.optimizer_classes import FP16_UnfusedOptimizer

__all__ = ["FP16_UnfusedOptimizer"]
