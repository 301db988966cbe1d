"""`deepspeed.moe.utils`: questions that scripts ask of every model; those without experts are answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from xtrain.base.errors import NotImplementedYetError


def is_moe_param(param: torch.Tensor) -> bool:
    """Whether a parameter is marked as an expert's (`param.allreduce = False`)."""
    return getattr(param, "allreduce", True) is False


def is_moe_param_group(param_group: dict[str, Any]) -> bool:
    """Whether a group of parameters is marked as one of experts."""
    return bool(param_group.get("moe", False))


def has_moe_layers(m: nn.Module) -> tuple[bool, int]:
    """(False, 0): a module cannot hold layers of experts, because there are none."""
    return False, 0


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: dict[str, Any] | Sequence[dict[str, Any]], max_group_size: float = 178956971
) -> list[dict[str, Any]]:
    """The groups themselves, as a list, when no parameter is an expert's.

    Args:
        max_group_size: only concerns groups of experts.

    Raises:
        NotImplementedYetError: a parameter is marked as an expert's.
    """
    groups = [param_groups] if isinstance(param_groups, dict) else list(param_groups)
    if any(is_moe_param(param) for group in groups for param in group["params"]):
        raise NotImplementedYetError(
            "a parameter group of experts (mixture of experts)",
            "write the layer in torch and train it data-parallel",
        )
    return groups
