"""`deepspeed.runtime.zero.parameter_offload`: the hooks of stage 3, and the dictionaries that watch parameters."""

from __future__ import annotations

from typing import Any

from xtrain.zero.model_hooks import WatchedParameters as ZeROOrderedDict
from xtrain.zero.parameter_offload import ParameterOffload as DeepSpeedZeRoOffload


def ensure_zero_ordered_dict(module: Any) -> None:
    """Let a module's `_parameters` be watched, if it has any and they are not; the former ones are kept in
    `_original_parameters`."""
    parameters = getattr(module, "_parameters", None)
    if parameters is None or isinstance(parameters, ZeROOrderedDict):
        return
    if not hasattr(module, "_original_parameters"):
        module._original_parameters = parameters
    module._parameters = ZeROOrderedDict(module, parameters)


__all__ = ["DeepSpeedZeRoOffload", "ZeROOrderedDict", "ensure_zero_ordered_dict"]
