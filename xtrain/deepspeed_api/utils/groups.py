"""Process groups under the names of `deepspeed.utils.groups`, for scripts that ask for them.

They are what the `mpu` of the engine that was built last says, under Megatron's old names or new ones; without one
all ranks are data parallel. Groups for experts are made on request (expert_groups.py); layers of experts are not there.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch.distributed as dist

from xtrain import comm
from xtrain.parallel import DataParallelGrid, grid_from_mpu
from xtrain.parallel.mpu import current, remember
from xtrain.utils.expert_groups import (
    _create_expert_and_data_parallel,
    _get_expert_data_parallel_group,
    _get_expert_data_parallel_group_dict,
    _get_expert_data_parallel_rank,
    _get_expert_data_parallel_world_size,
    _get_expert_parallel_group,
    _get_expert_parallel_group_dict,
    _get_expert_parallel_rank,
    _get_expert_parallel_ranks,
    _get_expert_parallel_world_size,
    _get_max_expert_parallel_group,
    _get_max_expert_size_name,
)

__all__ = [
    "_create_expert_and_data_parallel",
    "_get_expert_data_parallel_group",
    "_get_expert_data_parallel_group_dict",
    "_get_expert_data_parallel_rank",
    "_get_expert_data_parallel_world_size",
    "_get_expert_parallel_group",
    "_get_expert_parallel_group_dict",
    "_get_expert_parallel_rank",
    "_get_expert_parallel_ranks",
    "_get_expert_parallel_world_size",
    "_get_max_expert_parallel_group",
    "_get_max_expert_size_name",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_world_size",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
]


def _grid() -> DataParallelGrid:
    return grid_from_mpu(current())


def _get_data_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that see different samples; None where sequences are divided and the mpu has no such group."""
    return comm.get_world_group() if current() is None else _grid().data_group


def _get_data_parallel_world_size() -> int:
    """How many they are."""
    return _grid().replicas


def _get_data_parallel_rank() -> int:
    """This process's number among them."""
    return _grid().replica


def _get_data_parallel_group_ranks() -> list[int]:
    """Their global ranks."""
    return list(dist.get_process_group_ranks(_get_data_parallel_group()))


def _get_broadcast_src_rank() -> int:
    """Global rank of the first that holds the same parameters, which they are broadcast from."""
    return _grid().source


def _get_model_parallel_world_size() -> int:
    """Ranks that hold one copy of the model together: tensor- and pipeline-parallel ones."""
    return _grid().model.size


def _get_sequence_parallel_world_size() -> int:
    """Ranks that a sample is divided over."""
    return _grid().sequence


def _get_sequence_parallel_group() -> dist.ProcessGroup | None:
    """Those ranks; a KeyError, as in DeepSpeed, when each has samples of its own."""
    if _grid().sequence_group is None:
        raise KeyError("No sequence parallel group found")
    return _grid().sequence_group


def _get_sequence_parallel_rank() -> int:
    """This process's number among them."""
    grid = _grid()
    return 0 if grid.sequence_group is None else comm.get_rank(grid.sequence_group)


def _get_sequence_data_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that hold the same parameters: data- and sequence-parallel ones."""
    return _grid().group or comm.get_world_group()


def _get_sequence_data_parallel_world_size() -> int:
    """How many ranks it has."""
    return _grid().size


def _get_sequence_data_parallel_rank() -> int:
    """This process's number in it."""
    return _grid().rank


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
get_model_parallel_world_size = _get_model_parallel_world_size


def _get_zero_param_intra_parallel_group() -> None:
    """The ranks of hpZ, which divide parameters once more among themselves: none, hpZ is not there."""


def get_model_parallel_rank() -> int:
    """This process's number among the ranks that hold one copy of the model."""
    return _grid().model.rank


def get_model_parallel_group() -> dist.ProcessGroup | None:
    """Those ranks; None when each holds a whole model."""
    return _grid().model.group


def get_tensor_model_parallel_world_size() -> int:
    """Ranks that a layer is divided over."""
    return _grid().model.tensor


def get_tensor_model_parallel_rank() -> int:
    """This process's number among them."""
    return _grid().model.tensor_rank


class _Groups(ModuleType):
    """This module, whose `mpu` is the engine's; as in DeepSpeed, a script may set it."""

    @property
    def mpu(self) -> Any:
        """The mpu of the engine that was built last, or the one that was set since."""
        return current()

    @mpu.setter
    def mpu(self, mpu: Any) -> None:
        remember(mpu)


sys.modules[__name__].__class__ = _Groups
