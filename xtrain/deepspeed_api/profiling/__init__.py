"""Profilers, under DeepSpeed's import paths."""

from xtrain.deepspeed_api.compat import packages

__getattr__ = packages.attributes(__name__)
