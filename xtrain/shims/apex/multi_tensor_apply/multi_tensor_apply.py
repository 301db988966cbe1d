"""The object that scripts pass an operation to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from xtrain.shims.apex.kernels.lists import TensorLists


class MultiTensorApply:
    """Calls `op(chunk_size, noop_flag_buffer, tensor_lists, *args)`.

    Attributes:
        available: True: scripts ask before they use it.
    """

    available = True
    warned = False

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def check_avail(self) -> None:
        """Raises in an apex without its extensions; here they are always there."""

    def __call__(
        self, op: Callable[..., Any], noop_flag_buffer: torch.Tensor, tensor_lists: TensorLists, *args: Any
    ) -> Any:
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)
