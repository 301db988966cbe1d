"""`deepspeed.runtime.fp16.fused_optimizer`: for `isinstance(engine.optimizer, ...)`."""

from xtrain.zero.kinds import FP16_Optimizer

__all__ = ["FP16_Optimizer"]
