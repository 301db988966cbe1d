"""The data-parallel group: the script's own `mpu` is honoured, else all ranks are one group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from xtrain import comm
from xtrain.errors import ConfigError, NotImplementedYetError


@dataclass(frozen=True)
class DataParallelGrid:
    """The ranks that hold the same parameters and see different samples.

    Attributes:
        group: their process group; None for all ranks.
        size: how many there are.
        rank: number of this process among them.
        source: global rank of the first of them, from which parameters are broadcast.
    """

    group: dist.ProcessGroup | None
    size: int
    rank: int
    source: int


def _ask(mpu: Any, *names: str) -> Any:
    """The answer of the first of `names` that the mpu has (Megatron's spellings differ by version)."""
    for name in names:
        method = getattr(mpu, name, None)
        if callable(method):
            return method()
    raise ConfigError(
        f"the mpu object has no method {names[0]}(): xtrain needs it to find the data-parallel ranks"
    )


def grid_from_mpu(mpu: Any | None) -> DataParallelGrid:
    """The data-parallel grid that `mpu` describes; all ranks when it is None.

    Raises:
        ConfigError: the mpu lacks a method that is needed.
        NotImplementedYetError: the mpu splits the model over ranks.
    """
    if mpu is None:
        return DataParallelGrid(None, comm.get_world_size(), comm.get_rank(), 0)
    for kind, names in {
        "tensor": ("get_model_parallel_world_size", "get_tensor_model_parallel_world_size"),
        "pipeline": ("get_pipe_parallel_world_size", "get_pipeline_model_parallel_world_size"),
    }.items():
        if any(callable(getattr(mpu, name, None)) for name in names) and _ask(mpu, *names) > 1:
            raise NotImplementedYetError(
                f"{kind} parallelism (mpu.{names[0]}() > 1)", "use an mpu whose model-parallel size is 1"
            )
    group = _ask(mpu, "get_data_parallel_group")
    size = _ask(mpu, "get_data_parallel_world_size")
    rank = _ask(mpu, "get_data_parallel_rank")
    return DataParallelGrid(group, size, rank, dist.get_global_rank(group, 0) if group is not None else 0)
