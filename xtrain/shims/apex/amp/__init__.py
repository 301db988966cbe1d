"""`apex.amp`: mixed precision by a model's and an optimizer's own means, O0 to O3.

For scripts that train without an engine. With `deepspeed.initialize` use the config's fp16, bf16 or torch_autocast.
"""

from xtrain.shims.apex import refused
from xtrain.shims.apex.amp._amp_state import _amp_state, master_params
from xtrain.shims.apex.amp.casts import (
    disable_casts,
    float_function,
    half_function,
    promote_function,
    register_float_function,
    register_half_function,
    register_promote_function,
)
from xtrain.shims.apex.amp.frontend import initialize, load_state_dict, state_dict
from xtrain.shims.apex.amp.handle import scale_loss

__all__ = [
    "_amp_state",
    "disable_casts",
    "float_function",
    "half_function",
    "initialize",
    "load_state_dict",
    "master_params",
    "promote_function",
    "register_float_function",
    "register_half_function",
    "register_promote_function",
    "scale_loss",
    "state_dict",
]

__getattr__ = refused.attributes(__name__)
