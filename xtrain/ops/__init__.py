"""DeepSpeed's names for optimizers: `xtrain.ops.adam.FusedAdam` and so on."""
