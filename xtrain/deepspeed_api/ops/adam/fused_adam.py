"""`deepspeed.ops.adam.fused_adam`: another path to the same class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xtrain.ops.adam import FusedAdam

CHUNK = 2048 * 32
"""Elements that a kernel which works on lists of tensors is given at a time."""


def multi_tensor_applier(
    op: Callable[..., Any], noop_flag_buffer: Any, tensor_lists: list[list[Any]], *args: Any
) -> Any:
    """Call a script's own kernel of Apex's form: `op(chunk size, flag, lists of tensors, *args)`."""
    return op(CHUNK, noop_flag_buffer, tensor_lists, *args)


__all__ = ["FusedAdam", "multi_tensor_applier"]
