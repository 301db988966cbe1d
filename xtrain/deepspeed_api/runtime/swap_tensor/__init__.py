"""`deepspeed.runtime.swap_tensor`: one number that scripts import; tensors on disk are mapped files."""

from xtrain.deepspeed_api.compat import packages

MIN_SWAPPABLE_BYTES = 1024**2
"""Smallest tensor that DeepSpeed moves to disk. xtrain moves tensors of any size."""

__getattr__ = packages.attributes(__name__)
