"""DeepSpeed's import paths below `deepspeed.runtime`: names of xtrain's own modules, nothing else."""

from xtrain.runtime import config

__all__ = ["config"]
