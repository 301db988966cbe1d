"""Where training states live when not on the device: host memory, or files mapped into memory.

A mapped file needs no reads and writes of our own: the operating system pages it in when the optimizer
works on it and out when memory is short. Each file is unlinked at once, so nothing stays behind whatever
ends the process, and its blocks are reserved, so a full disk is an error here and not a crash later.
"""

from __future__ import annotations

import enum
import os
import tempfile
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtrain.backends import Backend
from xtrain.config.schema import OffloadConfig
from xtrain.errors import ConfigError
from xtrain.log import log_dist

if TYPE_CHECKING:
    from xtrain.zero.optimizer import ZeroOptimizer
    from xtrain.zero.partition import Partition


class OffloadDeviceEnum(str, enum.Enum):
    """Where to; DeepSpeed's names. `nvme` is any disk."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, enum.Enum):
    """Kinds of states, with DeepSpeed's names: optimizer states, masters, parameters, gradients (both)."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class HostMemory:
    """Host memory, page-locked if asked for and the backend has such."""

    def __init__(self, backend: Backend, pin: bool) -> None:
        self._backend = backend
        self._pin = pin

    def allocate(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeros."""
        data = torch.zeros(elements, dtype=dtype)
        return self._backend.runtime.pin_memory(data) if self._pin else data

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is in this kind of memory already."""
        return tensor.device.type == "cpu"


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
    if backend.runtime.host_memory:
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


# ---------------------------------------------------------------- engine.offload_states, reload_states


def _as_kinds(include: Collection[Any] | None) -> frozenset[OffloadStateTypeEnum]:
    """The kinds of states a call asks for; all of them for None."""
    try:
        return frozenset(OffloadStateTypeEnum if include is None else map(OffloadStateTypeEnum, include))
    except ValueError as error:
        names = ", ".join(kind.value for kind in OffloadStateTypeEnum)
        raise ConfigError(f"offload_states(include=...): {error}: choose from {names}") from None


def _move(
    partition: Partition,
    optimizer: ZeroOptimizer,
    kinds: frozenset[OffloadStateTypeEnum],
    place: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Replace the storage of every state of the given kinds by what `place` makes of it."""
    if OffloadStateTypeEnum.lp_params in kinds:
        for group in (*partition.trained, *partition.frozen):
            group.move(place)
            if group.members and hasattr(group.members[0], "ds_tensor"):
                group.show_pieces()
    if OffloadStateTypeEnum.hp_params in kinds:
        for group in partition.trained:
            for master in group.own_masters():
                master.data = place(master.data)
    if OffloadStateTypeEnum.optim_states in kinds:
        for state in optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and value.ndim:
                    state[name] = place(value)
    if kinds & {OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer}:
        for item in partition.gradients:
            item.move(place)


def offload_states(
    partition: Partition,
    optimizer: ZeroOptimizer,
    backend: Backend,
    include: Collection[Any] | None,
    device: str,
    pin_memory: bool,
) -> None:
    """See XtrainEngine.offload_states.

    Raises:
        ConfigError: an unknown kind or device, states that are offloaded already, or a disk without a path.
    """
    kinds = _as_kinds(include)
    if partition.offloaded:
        raise ConfigError("offload_states() was called twice: call reload_states() in between")
    memory: Memory
    if device == OffloadDeviceEnum.nvme:
        if not isinstance(partition.state_memory, DiskMemory):
            raise ConfigError(
                'offload_states(device="nvme") needs a path: set zero_optimization.offload_optimizer '
                'to {"device": "nvme", "nvme_path": ...}'
            )
        memory = partition.state_memory
    elif device == OffloadDeviceEnum.cpu:
        memory = HostMemory(backend, pin_memory)
    else:
        raise ConfigError(f"offload_states(device={device!r}): choose cpu or nvme")
    partition.offloaded = kinds
    _move(partition, optimizer, kinds, partial(move_into, memory))


def reload_states(partition: Partition, optimizer: ZeroOptimizer, device: torch.device) -> None:
    """See XtrainEngine.reload_states. States that the config keeps elsewhere go back there."""
    kinds, partition.offloaded = partition.offloaded, frozenset()
    kept = {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}
    if partition.state_memory is not None:
        _move(partition, optimizer, kinds & kept, partial(move_into, partition.state_memory))
        kinds -= kept
    _move(partition, optimizer, kinds, lambda tensor: tensor.to(device, copy=True))
