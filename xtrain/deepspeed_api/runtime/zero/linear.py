"""`deepspeed.runtime.zero.linear`: the memory-efficient linear layer."""

from xtrain.zero.linear import LinearFunctionForZeroStage3, LinearModuleForZeroStage3, zero3_linear_wrap

__all__ = ["LinearFunctionForZeroStage3", "LinearModuleForZeroStage3", "zero3_linear_wrap"]
