"""Where training states live when not on the device: host memory, or files mapped into memory.

A mapped file needs no reads and writes of our own: the operating system pages it in when the optimizer
works on it and out when memory is short. Each file is unlinked at once, so nothing stays behind whatever
ends the process, and its blocks are reserved, so a full disk is an error here and not a crash later.
"""

from __future__ import annotations

import enum
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from xtrain.backends import Backend
from xtrain.backends.locked_memory import get_active_native_pinned_memory
from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.config.schema import OffloadConfig


class OffloadStateTypeEnum(str, enum.Enum):
    """Kinds of states, with DeepSpeed's names: optimizer states, masters, parameters, gradients (both)."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class HostMemory:
    """Host memory, page-locked if asked for and the backend has such; locked by the operating system where
    DS_PIN_MEMORY_BACKEND is "native".
    """

    def __init__(self, backend: Backend, pin: bool) -> None:
        self._backend = backend
        self._pin = pin
        self._locked = get_active_native_pinned_memory() if pin else None

    def allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros.

        Raises:
            BackendError: the operating system allows no more locked memory.
        """
        if self._locked is not None:
            return self._locked.pin_empty(torch.empty(0, dtype=dtype), (elements,)).zero_()
        data = torch.zeros(elements, dtype=dtype)
        return self._backend.runtime.pin_memory(data) if self._pin else data

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in this kind of memory already."""
        return tensor.device.type == "cpu" if self._locked is None else self._locked.is_pinned(tensor)

    def unlock(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let the operating system swap them out, if it was kept from that."""
        if self._locked is not None:
            for tensor in tensors:
                self._locked.unpin_where(tensor)


class DiskMemory:
    """Mapped files in a folder of a local disk.

    Raises:
        ConfigError: the folder cannot be written to, or has no room.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._mapped: set[int] = set()

    def allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros."""
        nbytes = elements * dtype.itemsize
        if nbytes == 0:
            return torch.zeros(0, dtype=dtype)
        path = ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, path = tempfile.mkstemp(".bin", "xtrain-", self._folder)
            try:
                os.posix_fallocate(handle, 0, nbytes)
            finally:
                os.close(handle)
            data = torch.from_file(path, shared=True, size=elements, dtype=dtype)
        except OSError as error:
            raise ConfigError(
                f"offloading to {self._folder} failed: {nbytes} bytes could not be reserved there: {error}"
            ) from None
        finally:
            if path:
                os.unlink(path)
        self._mapped.add(data.untyped_storage().data_ptr())
        return data

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in this kind of memory already."""
        return tensor.untyped_storage().data_ptr() in self._mapped


Memory = HostMemory | DiskMemory


def memory_of(config: OffloadConfig | None, key: str, backend: Backend) -> Memory | None:
    """The memory that a config section names; None: the device's own.

    Raises:
        ConfigError: a disk without a path.
    """
    if config is None or config.device == "none":
        return None
    if config.device == "nvme":
        if config.nvme_path is None:
            raise ConfigError(
                f"config key {key!r} has device 'nvme' but no 'nvme_path': name a folder on a local disk"
            )
        return DiskMemory(config.nvme_path)
    locked = config.pin_memory and get_active_native_pinned_memory() is not None
    if backend.runtime.host_memory and not locked:
        log_dist(
            f"config key {key!r} has no effect: the memory of backend {backend.name!r} is the host's",
            ranks=[0],
        )
        return None
    return HostMemory(backend, config.pin_memory)


def move_into(memory: Memory, tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor in `memory`; the tensor itself when it is there already."""
    if memory.holds(tensor):
        return tensor
    return memory.allocate(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)
