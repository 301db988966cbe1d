"""DeepSpeed's `deepspeed.utils`: logging, parameters' divided states, groups, meta-device construction.

Names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtrain.dataloader import RepeatingLoader
    from xtrain.log import log_dist, logger
    from xtrain.utils.init_on_device import OnDevice
    from xtrain.utils.logging import log_dist_once, set_log_level_from_string
    from xtrain.utils.tensor_fragment import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_full_optimizer_state,
        safe_get_local_fp32_param,
        safe_get_local_grad,
        safe_get_local_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_grad,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_grad,
        safe_set_local_optimizer_state,
        safe_update_full_grad_vectorized,
    )
    from xtrain.utils.z3_leaf_module import (
        get_z3_leaf_modules,
        set_z3_leaf_module,
        set_z3_leaf_modules,
        set_z3_leaf_modules_by_name,
        set_z3_leaf_modules_by_suffix,
        unset_z3_leaf_modules,
        z3_leaf_module,
        z3_leaf_parameter,
    )

_HOMES = {
    "xtrain.log": ("log_dist", "logger"),
    "xtrain.dataloader": ("RepeatingLoader",),
    "xtrain.utils.logging": ("log_dist_once", "set_log_level_from_string"),
    "xtrain.utils.init_on_device": ("OnDevice",),
    "xtrain.utils.tensor_fragment": (
        "safe_get_full_fp32_param",
        "safe_get_full_grad",
        "safe_get_full_optimizer_state",
        "safe_get_local_fp32_param",
        "safe_get_local_grad",
        "safe_get_local_optimizer_state",
        "safe_set_full_fp32_param",
        "safe_set_full_grad",
        "safe_set_full_optimizer_state",
        "safe_set_local_fp32_param",
        "safe_set_local_grad",
        "safe_set_local_optimizer_state",
        "safe_update_full_grad_vectorized",
    ),
    "xtrain.utils.z3_leaf_module": (
        "get_z3_leaf_modules",
        "set_z3_leaf_module",
        "set_z3_leaf_modules",
        "set_z3_leaf_modules_by_name",
        "set_z3_leaf_modules_by_suffix",
        "unset_z3_leaf_modules",
        "z3_leaf_module",
        "z3_leaf_parameter",
    ),
}
_EXPORTS = {name: home for home, names in _HOMES.items() for name in names}
_SUBMODULES = ("groups", "init_on_device", "logging", "tensor_fragment", "z3_leaf_module")

__all__ = [
    "OnDevice",
    "RepeatingLoader",
    "get_z3_leaf_modules",
    "log_dist",
    "log_dist_once",
    "logger",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
    "set_log_level_from_string",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"xtrain.utils.{name}")
    elif name.startswith("_"):
        raise AttributeError(f"module 'xtrain.utils' has no attribute {name!r}")
    else:
        raise AttributeError(
            f"xtrain.utils has no {name!r} yet; if it is part of DeepSpeed's API, the script needs a later release"
        )
    globals()[name] = value
    return value
