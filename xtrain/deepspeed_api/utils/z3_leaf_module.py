"""`deepspeed.utils.z3_leaf_module`: modules that ZeRO stage 3 gathers as one piece."""

from xtrain.zero.leaf_modules import *  # noqa: F403
