"""Moving training states off the device and back: `engine.offload_states`, `engine.reload_states`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch

from xtrain.base.errors import ConfigError
from xtrain.zero.state_memory import DiskMemory, HostMemory, Memory, OffloadStateTypeEnum, move_into
from xtrain.zero.train_state import TrainState


class OffloadDeviceEnum(str, enum.Enum):
    """Where to; DeepSpeed's names. `nvme` is any disk."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


def _as_kinds(include: Collection[Any] | None) -> frozenset[OffloadStateTypeEnum]:
    """The kinds of states a call asks for; all of them for None."""
    try:
        return frozenset(OffloadStateTypeEnum if include is None else map(OffloadStateTypeEnum, include))
    except ValueError as error:
        names = ", ".join(kind.value for kind in OffloadStateTypeEnum)
        raise ConfigError(f"offload_states(include=...): {error}: choose from {names}") from None


def _move(
    train_state: TrainState,
    kinds: frozenset[OffloadStateTypeEnum],
    place: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Replace the storage of every state of the given kinds by what `place` makes of it."""
    partition, optimizer = train_state.partition, train_state.optimizer
    assert optimizer is not None
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


def offload_states(state: TrainState, include: Collection[Any] | None, device: str, pin_memory: bool) -> None:
    """See XtrainEngine.offload_states.

    Raises:
        ConfigError: nothing is trained, an unknown kind or device, states that are offloaded already, or a disk
            without a path.
    """
    partition = state.partition
    if state.optimizer is None:
        raise ConfigError("offload_states() needs an optimizer: without one there are only parameters")
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
        memory = HostMemory(state.backend, pin_memory)
    else:
        raise ConfigError(f"offload_states(device={device!r}): choose cpu or nvme")
    partition.offloaded = kinds
    _move(state, kinds, partial(move_into, memory))


def reload_states(state: TrainState) -> None:
    """See XtrainEngine.reload_states. States that the config keeps elsewhere go back there."""
    partition = state.partition
    if state.optimizer is None:
        return
    kinds, partition.offloaded = partition.offloaded, frozenset()
    kept = {OffloadStateTypeEnum.hp_params, OffloadStateTypeEnum.optim_states}
    if partition.state_memory is not None:
        _move(state, kinds & kept, partial(move_into, partition.state_memory))
        kinds -= kept
    _move(state, kinds, lambda tensor: tensor.to(state.device, copy=True))
