"""`deepspeed.runtime.fp16.fused_optimizer`: for `isinstance(engine.optimizer, ...)`."""

from xtrain.deepspeed_api.optimizer_classes import FP16_Optimizer

__all__ = ["FP16_Optimizer"]
