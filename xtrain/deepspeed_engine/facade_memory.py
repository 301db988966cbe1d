"""The part of the accelerator interface about memory: statistics and pinned buffers.

Statistics come from torch's module for the device; a host has none, there the process's resident memory
is meant, as in DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from xtrain.backends import Backend, host
from xtrain.base.errors import ConfigError


def _resident() -> int:
    return host.resident()[0]


def _peak() -> int:
    return host.resident()[1]


def _asks(name: str, of_host: Callable[[], Any], doc: str) -> Any:
    """A method: `name` of torch's module for the device, or what `of_host` returns on a host."""

    def method(self: Any, device_index: int | None = None) -> Any:
        return of_host() if self._is_host else getattr(self._module, name)(device_index)

    method.__name__, method.__doc__ = name, doc
    return method


class MemoryMethods:
    """Bytes used and available, and host buffers that a device can copy from without staging."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._name = backend.runtime.device_type

    @property
    def _module(self) -> ModuleType:
        return torch.get_device_module(self._name)

    @property
    def _is_host(self) -> bool:
        return self.backend.runtime.host_memory

    def empty_cache(self) -> None:
        """Give cached device memory back; a host caches none."""
        if not self._is_host:
            self._module.empty_cache()

    memory_allocated = _asks(
        "memory_allocated", _resident, "Bytes in tensors now; on a host, of the process."
    )
    max_memory_allocated = _asks("max_memory_allocated", _peak, "The most since the start or the last reset.")
    memory_reserved = _asks("memory_reserved", _resident, "Bytes that torch holds, in tensors or cached.")
    max_memory_reserved = _asks("max_memory_reserved", _peak, "The most since the start or the last reset.")
    memory_cached, max_memory_cached = memory_reserved, max_memory_reserved  # their old names
    reset_peak_memory_stats = _asks("reset_peak_memory_stats", lambda: host.reset_peak(), "Start new peaks.")
    reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats

    def memory_stats(self, device_index: int | None = None) -> dict[str, Any]:
        """torch's statistics of the device; on a host, two of them: allocated bytes, current and peak."""
        if not self._is_host:
            return dict(self._module.memory_stats(device_index))
        return {"allocated_bytes.all.current": _resident(), "allocated_bytes.all.peak": _peak()}

    def total_memory(self, device_index: int | None = None) -> int:
        """Bytes that the device has."""
        return host.in_use()[1] if self._is_host else int(self._module.mem_get_info(device_index)[1])

    def available_memory(self, device_index: int | None = None) -> int:
        """Bytes that nobody uses."""
        if self._is_host:
            used, everything = host.in_use()
            return everything - used
        return int(self._module.mem_get_info(device_index)[0])

    # ---------------------------------------------------------------- pinned host memory

    def pin_memory(
        self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True
    ) -> torch.Tensor:
        """The tensor in page-locked host memory; on a host, the tensor itself.

        Args:
            make_copy: False: an uninitialised pinned tensor of its size.
            match_shape: with `make_copy=False`, keep the shape; otherwise flat.
        """
        if make_copy or self._is_host:
            return tensor if self._is_host else tensor.pin_memory()
        return self.pin_empty_like(tensor if match_shape else tensor.flatten())

    def pin_empty(self, *size: Any, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
        """An uninitialised host tensor, page-locked where there is a device to copy to.

        Raises:
            ConfigError: `device` is not the host.
        """
        if torch.device(device).type != "cpu":
            raise ConfigError(f"pin_empty() allocates host memory: device must be 'cpu', not {device!r}")
        return torch.empty(*size, dtype=dtype, pin_memory=not self._is_host)

    def pin_empty_like(
        self, tensor: torch.Tensor, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """`pin_empty` with the tensor's shape and, unless told otherwise, dtype."""
        return self.pin_empty(tuple(tensor.shape), dtype=dtype or tensor.dtype, device=device)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor lies in page-locked memory; never where there is no device to lock it for."""
        return not self._is_host and tensor.is_pinned()

    def unpin_memory(self, tensor: torch.Tensor) -> None:
        """Nothing to do: torch unlocks memory when the tensor is freed."""

    def pin_memory_alignment(self) -> int:
        """Bytes to which registered host memory must be aligned; 1 for none."""
        return 1

    def register_host_memory(self, address: int, num_bytes: int) -> bool:
        """False: memory allocated elsewhere is never registered with a device."""
        return False

    def unregister_host_memory(self, address: int) -> None:
        """Nothing to do: nothing is ever registered."""
