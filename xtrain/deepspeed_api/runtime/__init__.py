"""DeepSpeed's import paths below `deepspeed.runtime`: names of xtrain's own modules, nothing else."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
