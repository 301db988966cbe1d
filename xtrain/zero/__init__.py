"""ZeRO: state (flat, shards), schedule (reducer, gather) and update (optimizer) of partitioned training states.

`xtrain.zero.Init` and its companions are what scripts use; they are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xtrain.base import missing

if TYPE_CHECKING:
    from xtrain.zero.estimate import (
        estimate_zero2_model_states_mem_needs,
        estimate_zero2_model_states_mem_needs_all_cold,
        estimate_zero2_model_states_mem_needs_all_live,
        estimate_zero3_model_states_mem_needs,
        estimate_zero3_model_states_mem_needs_all_cold,
        estimate_zero3_model_states_mem_needs_all_live,
    )
    from xtrain.zero.gathered import (
        GatheredParameters,
        register_external_parameter,
        unregister_external_parameter,
        unwrap_model_for_generation,
    )
    from xtrain.zero.home import ZeroParamStatus
    from xtrain.zero.init import Init
    from xtrain.zero.tiling import TiledLinear, TiledLinearReturnBias

_EXPORTS = {
    "GatheredParameters": "xtrain.zero.gathered",
    "Init": "xtrain.zero.init",
    "TiledLinear": "xtrain.zero.tiling",
    "TiledLinearReturnBias": "xtrain.zero.tiling",
    "ZeroParamStatus": "xtrain.zero.home",
    "estimate_zero2_model_states_mem_needs": "xtrain.zero.estimate",
    "estimate_zero2_model_states_mem_needs_all_cold": "xtrain.zero.estimate",
    "estimate_zero2_model_states_mem_needs_all_live": "xtrain.zero.estimate",
    "estimate_zero3_model_states_mem_needs": "xtrain.zero.estimate",
    "estimate_zero3_model_states_mem_needs_all_cold": "xtrain.zero.estimate",
    "estimate_zero3_model_states_mem_needs_all_live": "xtrain.zero.estimate",
    "register_external_parameter": "xtrain.zero.gathered",
    "unregister_external_parameter": "xtrain.zero.gathered",
    "unwrap_model_for_generation": "xtrain.zero.gathered",
}

__all__ = [
    "GatheredParameters",
    "Init",
    "TiledLinear",
    "TiledLinearReturnBias",
    "ZeroParamStatus",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
    "register_external_parameter",
    "unregister_external_parameter",
    "unwrap_model_for_generation",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise missing.name_error(f"zero.{name}") or AttributeError(
            f"module 'xtrain.zero' has no attribute {name!r}"
        )
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
