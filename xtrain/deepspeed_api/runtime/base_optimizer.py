"""`deepspeed.runtime.base_optimizer`: for `isinstance(engine.optimizer, ...)`."""

from xtrain.zero.optimizer import ZeroOptimizer as DeepSpeedOptimizer
from xtrain.zero.optimizer import ZeroOptimizer as ZeROOptimizer

__all__ = ["DeepSpeedOptimizer", "ZeROOptimizer"]
