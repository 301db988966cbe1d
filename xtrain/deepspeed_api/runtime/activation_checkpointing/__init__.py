"""Import paths of `deepspeed.runtime.activation_checkpointing`."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
