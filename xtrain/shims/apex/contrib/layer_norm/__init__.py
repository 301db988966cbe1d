"""`apex.contrib.layer_norm`: layer norm over the last dimension."""

from xtrain.shims.apex.contrib.layer_norm.layer_norm import FastLayerNorm

__all__ = ["FastLayerNorm"]
