"""The forward pass under torch.autocast, as the config's `torch_autocast` section says."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

from xtrain.base.log import log_dist
from xtrain.config.schema import TorchAutocastConfig
from xtrain.precision.policy import DTYPES

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
