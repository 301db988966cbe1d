"""ZeRO: state (flat), schedule (reducer) and update (optimizer) of partitioned training states.

What scripts use is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtrain.zero.estimate import (
        estimate_zero2_model_states_mem_needs,
        estimate_zero2_model_states_mem_needs_all_cold,
        estimate_zero2_model_states_mem_needs_all_live,
        estimate_zero3_model_states_mem_needs,
        estimate_zero3_model_states_mem_needs_all_cold,
        estimate_zero3_model_states_mem_needs_all_live,
    )

_EXPORTS = {
    "estimate_zero2_model_states_mem_needs": "xtrain.zero.estimate",
    "estimate_zero2_model_states_mem_needs_all_cold": "xtrain.zero.estimate",
    "estimate_zero2_model_states_mem_needs_all_live": "xtrain.zero.estimate",
    "estimate_zero3_model_states_mem_needs": "xtrain.zero.estimate",
    "estimate_zero3_model_states_mem_needs_all_cold": "xtrain.zero.estimate",
    "estimate_zero3_model_states_mem_needs_all_live": "xtrain.zero.estimate",
}

__all__ = [
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'xtrain.zero' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value
