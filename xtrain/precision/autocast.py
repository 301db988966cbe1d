"""The forward pass under torch.autocast, as the config's `torch_autocast` section says."""

from __future__ import annotations

import importlib
import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.config.schema import TorchAutocastConfig
from xtrain.precision.policy import DTYPES

SAFE_MODULES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Classes whose gradients travel in the autocast dtype unless the config names others; DeepSpeed's."""
COMM_DTYPE = "comm_dtype"
"""Attribute of a parameter whose gradient travels in another dtype than its own; DeepSpeed's name."""

_told: set[str] = set()


def _tell_once(message: str, level: int) -> None:
    if message not in _told:
        _told.add(message)
        log_dist(message, ranks=[0], level=level)


def autocast_region(config: TorchAutocastConfig, device_type: str) -> AbstractContextManager[object]:
    """What the engine's forward pass runs under.

    The section decides; an autocast region that the script has opened around the engine's call gives way to
    it, as in DeepSpeed. Regions inside the model are the model's own.
    """
    outside = torch.is_autocast_enabled(device_type)
    if config.enabled:
        if outside:
            _tell_once(
                "torch.autocast is enabled around the engine's forward pass: the config's torch_autocast section is "
                "used inside",
                logging.INFO,
            )
        return torch.autocast(device_type, dtype=DTYPES[config.dtype])
    if outside:
        _tell_once(
            "torch.autocast is enabled around the engine's forward pass, and is off inside it, as in DeepSpeed: "
            'set "torch_autocast": {"enabled": true} in the config to use it',
            logging.WARNING,
        )
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _class_named(name: str) -> type:
    package, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(package), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"config key 'torch_autocast.lower_precision_safe_modules': {name!r} cannot be imported ({error}); write "
            "the class with its module, as in torch.nn.modules.linear.Linear"
        ) from None
    if not isinstance(found, type):
        raise ConfigError(f"config key 'torch_autocast.lower_precision_safe_modules': {name!r} is no class")
    return found


def mark_communication(module: nn.Module, config: TorchAutocastConfig, aligned: bool) -> None:
    """Set `param.comm_dtype` where a gradient travels in the autocast dtype; take it away elsewhere.

    So it is in the modules that the section's `lower_precision_safe_modules` names, as in DeepSpeed; never in aligned
    mode, which sums in float32.

    Raises:
        ConfigError: a name cannot be imported.
    """
    names = config.lower_precision_safe_modules
    safe = SAFE_MODULES if names is None else tuple(map(_class_named, names))
    dtype = DTYPES[config.dtype]
    lowers = config.enabled and not aligned
    low = {
        p
        for child in module.modules()
        if lowers and type(child) in safe
        for p in child.parameters(recurse=False)
    }
    for param in module.parameters():
        if param in low and param.is_floating_point():
            setattr(param, COMM_DTYPE, dtype)
        elif hasattr(param, COMM_DTYPE):
            delattr(param, COMM_DTYPE)
