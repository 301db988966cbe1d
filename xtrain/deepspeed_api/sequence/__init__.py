"""`deepspeed.sequence`: attention over divided sequences."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
