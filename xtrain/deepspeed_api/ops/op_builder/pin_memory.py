"""The operator that locks host memory, which the operating system's own call does: nothing is compiled for it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from xtrain.backends.locked_memory import NativePinnedMemory
from xtrain.ops.op_builder.builder import OpBuilder


class PinHandle:
    """Hands out tensors in memory that the operating system may not swap out."""

    def __init__(self) -> None:
        self._memory = NativePinnedMemory()

    def new_cpu_locked_tensor(self, num_elem: int, example_tensor: torch.Tensor) -> torch.Tensor:
        """(num_elem,) of the example's dtype, with undefined values.

        Raises:
            BackendError: the operating system allows no more locked memory.
        """
        return self._memory.pin_empty(example_tensor, (num_elem,))

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Unlock what `new_cpu_locked_tensor` returned, which stays valid; False for any other tensor."""
        return self._memory.unpin(tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor, or what it is a view of, lies in memory that is locked here."""
        return self._memory.is_pinned(tensor)


class PinMemoryBuilder(OpBuilder):
    """DeepSpeed's operator 'pin_memory': locks host memory without an accelerator."""

    NAME = "pin_memory"
    instead = "call load(), which compiles nothing"

    def is_compatible(self, verbose: bool = False) -> bool:
        """True: the C library locks memory."""
        return True

    def load(self, verbose: bool = True) -> SimpleNamespace:
        """What has `pin_handle`, the class of handles."""
        return SimpleNamespace(pin_handle=PinHandle)


__all__ = ["PinHandle", "PinMemoryBuilder"]
