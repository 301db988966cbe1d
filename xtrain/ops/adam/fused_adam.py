"""`deepspeed.ops.adam.fused_adam`: another path to the same class."""

from xtrain.ops.adam import FusedAdam

__all__ = ["FusedAdam"]
