"""`deepspeed.runtime.comm`: collectives on many tensors at once."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
