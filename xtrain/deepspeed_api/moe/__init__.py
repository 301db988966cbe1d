"""`deepspeed.moe`: what scripts import from it and call on models without experts."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
