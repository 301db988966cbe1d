"""`deepspeed.utils.torch`: questions about the version of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.torch_version import TorchVersion

from xtrain.base.errors import ConfigError


def required_torch_version(
    min_version: str | float | None = None, max_version: str | float | None = None
) -> bool:
    """Whether PyTorch's version lies between the two, both included.

    Raises:
        ConfigError: neither is given.
    """
    if min_version is None and max_version is None:
        raise ConfigError("required_torch_version() needs min_version or max_version")
    installed = TorchVersion(torch.__version__)
    return (min_version is None or installed >= str(min_version)) and (
        max_version is None or installed <= str(max_version)
    )


def register_grad_hook(param: torch.Tensor, hook: Callable[[torch.Tensor], Any]) -> Any:
    """Call `hook(param)` whenever a gradient has been added to it; a handle with `remove()`."""
    return param.register_post_accumulate_grad_hook(hook)
