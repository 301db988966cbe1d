"""`deepspeed.utils.tensor_fragment`: a parameter's gradient, float32 weight and optimizer states."""

from xtrain.zero.tensor_fragment import *  # noqa: F403
