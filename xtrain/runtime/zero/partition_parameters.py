"""`deepspeed.runtime.zero.partition_parameters`: divided parameters under DeepSpeed's names."""

from xtrain.zero.gathered import (
    GatheredParameters,
    register_external_parameter,
    unregister_external_parameter,
)
from xtrain.zero.home import ZeroParamStatus
from xtrain.zero.init import Init

__all__ = [
    "GatheredParameters",
    "Init",
    "ZeroParamStatus",
    "register_external_parameter",
    "unregister_external_parameter",
]
