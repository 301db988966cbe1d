"""Import paths of `deepspeed.runtime.fp16`."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
