"""`deepspeed.runtime.zero.tiling`: linear layers in tiles."""

from xtrain.zero.tiling import TiledLinear, TiledLinearReturnBias

__all__ = ["TiledLinear", "TiledLinearReturnBias"]
