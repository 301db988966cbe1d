"""DeepSpeed's import paths below `deepspeed.runtime` that scripts use; the code is elsewhere."""

from xtrain.runtime import config

__all__ = ["config"]
