"""Profilers, under DeepSpeed's import paths."""

from xtrain.compat import packages

__getattr__ = packages.attributes(__name__)
