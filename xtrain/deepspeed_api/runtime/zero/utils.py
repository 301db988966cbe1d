"""`deepspeed.runtime.zero.utils`: what scripts ask and catch."""

from __future__ import annotations

import torch

from xtrain.base.errors import ConfigError
from xtrain.optim.build import check_elementwise


class ZeRORuntimeException(ConfigError):
    """An optimizer cannot be used as the config wants it to be."""


def is_zero_supported_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer may be divided without `zero_allow_untested_optimizer`."""
    try:
        check_elementwise(optimizer, stage=1, allow_untested=False)
    except ConfigError:
        return False
    return True


__all__ = ["ZeRORuntimeException", "is_zero_supported_optimizer"]
