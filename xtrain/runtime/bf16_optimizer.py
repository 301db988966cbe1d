"""`deepspeed.runtime.bf16_optimizer`: for `isinstance(engine.optimizer, ...)`."""

from xtrain.zero.kinds import BF16_Optimizer

__all__ = ["BF16_Optimizer"]
