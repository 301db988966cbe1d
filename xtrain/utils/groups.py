"""Process groups under the names of `deepspeed.utils.groups`, for scripts that ask for them.

There is data parallelism only: all ranks, or what the `mpu` of the engine that was built last says. Other kinds
of parallelism have groups of one rank; expert parallelism is not there.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from xtrain import comm

mpu: Any = None
"""The engine's, as in DeepSpeed; set by `initialize`."""


def _get_data_parallel_group() -> dist.ProcessGroup | None:
    """The ranks that hold the same parameters."""
    return comm.get_world_group() if mpu is None else mpu.get_data_parallel_group()


def _get_data_parallel_world_size() -> int:
    """How many they are."""
    return comm.get_world_size() if mpu is None else mpu.get_data_parallel_world_size()


def _get_data_parallel_rank() -> int:
    """This process's number among them."""
    return comm.get_rank() if mpu is None else mpu.get_data_parallel_rank()


def _get_data_parallel_group_ranks() -> list[int]:
    """Their global ranks."""
    return list(dist.get_process_group_ranks(_get_data_parallel_group()))


def _get_broadcast_src_rank() -> int:
    """Global rank of the first of them, which parameters are broadcast from."""
    return _get_data_parallel_group_ranks()[0]


def _get_model_parallel_world_size() -> int:
    """Ranks that a layer is divided over."""
    return 1 if mpu is None else mpu.get_model_parallel_world_size()


def _get_sequence_parallel_world_size() -> int:
    """Ranks that a sequence is divided over: one."""
    return 1


def _get_sequence_parallel_rank() -> int:
    """This process's number among them."""
    return 0


def _get_sequence_data_parallel_group() -> dist.ProcessGroup | None:
    """With sequences whole, the data-parallel group."""
    return _get_data_parallel_group()


def _get_sequence_data_parallel_world_size() -> int:
    """How many ranks it has."""
    return _get_data_parallel_world_size()


def _get_sequence_data_parallel_rank() -> int:
    """This process's number in it."""
    return _get_data_parallel_rank()


get_data_parallel_group = _get_data_parallel_group
get_data_parallel_world_size = _get_data_parallel_world_size
get_data_parallel_rank = _get_data_parallel_rank
get_model_parallel_world_size = get_tensor_model_parallel_world_size = _get_model_parallel_world_size


def get_model_parallel_rank() -> int:
    """This process's number among the ranks that a layer is divided over."""
    return 0 if mpu is None else mpu.get_model_parallel_rank()


get_tensor_model_parallel_rank = get_model_parallel_rank


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module 'xtrain.utils.groups' has no attribute {name!r}")
    raise AttributeError(f"xtrain.utils.groups has no {name!r} yet: there is data parallelism only")
