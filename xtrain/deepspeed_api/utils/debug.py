"""`deepspeed.utils.debug`: names of modules and parameters, for messages of a script's own."""

from __future__ import annotations

from torch import nn

_modules: dict[nn.Module, str] = {}
_parameters: dict[nn.Parameter, str] = {}


def debug_extract_module_and_param_names(model: nn.Module) -> None:
    """Remember what the model calls its modules and parameters."""
    _modules.clear()
    _parameters.clear()
    _modules.update({module: name for name, module in model.named_modules()})
    _parameters.update({parameter: name for name, parameter in model.named_parameters()})


def debug_module2name(module: nn.Module) -> str:
    """Its name; "unknown" for one that was not remembered."""
    return _modules.get(module, "unknown")


def debug_param2name(param: nn.Parameter) -> str:
    """Its name; "unknown" for one that was not remembered."""
    return _parameters.get(param, "unknown")


__all__ = ["debug_extract_module_and_param_names", "debug_module2name", "debug_param2name"]
