"""`deepspeed.runtime.bf16_optimizer`: for `isinstance(engine.optimizer, ...)`."""

from xtrain.deepspeed_api.optimizer_classes import BF16_Optimizer

__all__ = ["BF16_Optimizer"]
