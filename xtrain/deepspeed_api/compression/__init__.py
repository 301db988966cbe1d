"""`deepspeed.compression`: two helpers that scripts take from there. Compression itself is not there."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
