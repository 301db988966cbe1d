"""Host memory that the operating system may not swap out, without an accelerator; no device is told of it.

The engine takes it for what it offloads and pins where DS_PIN_MEMORY_BACKEND is "native", and the backend's own
page-locked memory otherwise; scripts may lock buffers of their own.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from xtrain.base.errors import BackendError


def _lock(address: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(size)):
        reason = os.strerror(ctypes.get_errno())
        raise BackendError(
            f"{size} bytes of memory cannot be locked ({reason}): raise the limit, `ulimit -l` in KiB"
        )


class NativePinnedMemory:
    """Tensors in locked host memory, which is given back with the last tensor that lies in it."""

    def __init__(self) -> None:
        self._ranges: dict[int, int] = {}  # first byte -> the one after the last

    def pin(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> torch.Tensor:
        """A tensor in locked memory, of the dtype and as many elements.

        Args:
            make_copy: with the values; else they are undefined.
            match_shape: in its shape; else one-dimensional.

        Raises:
            BackendError: the operating system allows no more locked memory.
        """
        pinned = self.pin_empty(tensor, tensor.shape if match_shape else (tensor.numel(),))
        if make_copy:
            pinned.copy_(tensor.view(pinned.shape))
        return pinned

    def pin_empty(self, example: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A tensor of the example's dtype in locked memory, with undefined values; raises as `pin`."""
        size = max(1, math.prod(shape) * example.element_size())
        memory = mmap.mmap(-1, size)
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        begin = whole.data_ptr()
        _lock(begin, size)
        self._ranges[begin] = begin + size
        # torch keeps the mapping as long as a tensor lies in it; closing it unlocks.
        weakref.finalize(memory, self._ranges.pop, begin, None)
        pinned = whole[: math.prod(shape) * example.element_size()].view(example.dtype).view(tuple(shape))
        pinned.ds_pinned, pinned.ds_pin_begin = True, begin  # type: ignore[attr-defined]
        return pinned

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether it lies in memory that is locked here; views do, too."""
        if isinstance(tensor, FakeTensor) or tensor.device.type != "cpu" or not tensor.numel():
            return False
        place = tensor.data_ptr()
        return any(begin <= place < end for begin, end in list(self._ranges.items()))

    def unpin(self, tensor: torch.Tensor) -> bool:
        """Unlock the memory that `pin` made for a tensor, wherever its data is now; False if there is none.

        Tensors that lie in it stay valid.
        """
        return self._unlock(getattr(tensor, "ds_pin_begin", None))

    def unpin_where(self, tensor: torch.Tensor) -> bool:
        """Unlock the memory in which a tensor's data lies now; False if it is not locked here."""
        place = tensor.data_ptr()
        return self._unlock(
            next((begin for begin, end in list(self._ranges.items()) if begin <= place < end), None)
        )

    def _unlock(self, begin: int | None) -> bool:
        end = None if begin is None else self._ranges.pop(begin, None)
        if begin is None or end is None:
            return False
        ctypes.CDLL(None).munlock(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin))
        return True


_shared: list[NativePinnedMemory] = []


def get_native_pinned_memory() -> NativePinnedMemory:
    """The one that the process shares."""
    if not _shared:
        _shared.append(NativePinnedMemory())
    return _shared[0]


def get_active_native_pinned_memory() -> NativePinnedMemory | None:
    """The same where DS_PIN_MEMORY_BACKEND is "native", else None."""
    wanted = os.environ.get("DS_PIN_MEMORY_BACKEND", "torch").strip().lower() == "native"
    return get_native_pinned_memory() if wanted else None


__all__ = ["NativePinnedMemory", "get_active_native_pinned_memory", "get_native_pinned_memory"]
