"""Import paths of `deepspeed.runtime.activation_checkpointing`."""

from xtrain.compat import packages

__getattr__ = packages.attributes(__name__)
