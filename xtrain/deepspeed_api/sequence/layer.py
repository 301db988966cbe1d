"""`deepspeed.sequence.layer`."""

from xtrain.parallel.ulysses import DistributedAttention

__all__ = ["DistributedAttention"]
