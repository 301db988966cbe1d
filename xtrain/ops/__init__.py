"""DeepSpeed's names for optimizers: `xtrain.ops.adam.FusedAdam` and so on."""

from xtrain.compat import packages

__getattr__ = packages.attributes(__name__)
