"""`deepspeed.runtime.zero.utils`: what scripts ask and catch."""

from __future__ import annotations

import torch

from xtrain.base.errors import ConfigError
from xtrain.optim import UnsuitableOptimizerError as ZeRORuntimeException
from xtrain.optim import check_elementwise


def is_zero_supported_optimizer(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer may be divided without `zero_allow_untested_optimizer`."""
    try:
        check_elementwise(optimizer, stage=1, allow_untested=False)
    except ConfigError:
        return False
    return True


__all__ = ["ZeRORuntimeException", "is_zero_supported_optimizer"]
