"""`deepspeed.runtime.zero.offload_states`: where the states are that `engine.offload_states` moves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xtrain.base.errors import ConfigError
from xtrain.zero.state_memory import OffloadStateTypeEnum

if TYPE_CHECKING:
    from xtrain.runtime.engine import XtrainEngine


def get_state_devices(model: XtrainEngine, state: OffloadStateTypeEnum) -> set[torch.device]:
    """The devices on which an engine's states of one kind are at the moment; none where there are no such states.

    Raises:
        ConfigError: the engine has no optimizer.
    """
    if model.optimizer is None:
        raise ConfigError("get_state_devices() needs an optimizer: without one there are only parameters")
    kind, partition = OffloadStateTypeEnum(state), model.partition
    if kind is OffloadStateTypeEnum.hp_params:
        return {master.device for master in model.optimizer.masters}
    if kind is OffloadStateTypeEnum.lp_params:
        whole = {group.params.device for group in partition.trained if group not in partition.sharded}
        return whole | {group.shard.device for group in partition.sharded}
    if kind is OffloadStateTypeEnum.optim_states:
        states = [value for state in model.optimizer.state.values() for value in state.values()]
        return {value.device for value in states if torch.is_tensor(value) and value.ndim}
    return {item.device for item in partition.gradients}
