"""DeepSpeed's `deepspeed.runtime.utils`: what scripts import from it."""

from xtrain.memory import see_memory_usage

__all__ = ["see_memory_usage"]
