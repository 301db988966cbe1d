"""A process grid for scripts that have no mpu of their own, over torch.distributed.device_mesh.

It answers under the names of Megatron's and DeepSpeed's mpu, so it can be passed as `mpu=`, and to real DeepSpeed as
well. What the engine makes of an mpu is in grid.py.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from xtrain import comm
from xtrain.base.errors import ConfigError

DIMENSIONS = ("pipeline", "data", "sequence", "tensor")
"""Outermost first: tensor-parallel ranks are neighbours, so they share a node; pipeline stages are farthest apart."""


class ProcessGrid:
    """Ranks in four dimensions: pipeline x data x sequence x tensor, the last one varying fastest.

    Collective over all ranks: process groups are made.

    Args:
        tensor: ranks that a layer is divided over.
        pipeline: stages that the layers are divided over.
        sequence: ranks that a sample is divided over.
        data: ranks that see different samples; None: what is left.

    Attributes:
        mesh: the DeviceMesh, with the dimensions `pipeline`, `data`, `sequence` and `tensor`: for
            `torch.distributed.tensor.parallel` and FSDP2.

    Raises:
        ConfigError: the sizes do not multiply to the number of ranks.

    Example::

        grid = xtrain.parallel.ProcessGrid(tensor=2)
        engine, *_ = xtrain.initialize(model=model, config=config, mpu=grid)
    """

    def __init__(
        self, tensor: int = 1, pipeline: int = 1, sequence: int = 1, data: int | None = None
    ) -> None:
        sizes = {"pipeline": pipeline, "data": data, "sequence": sequence, "tensor": tensor}
        for name, size in sizes.items():
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ConfigError(f"ProcessGrid({name}={size!r}) must be a whole number of at least 1")
        comm.init_distributed(verbose=False)
        ranks, others = comm.get_world_size(), tensor * pipeline * sequence
        if data is None and ranks % others == 0:
            data = ranks // others
        if data is None or data * others != ranks:
            told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)
            raise ConfigError(
                f"ProcessGrid: {told} does not divide {ranks} ranks: choose sizes whose product does"
            )
        self._shape = (pipeline, data, sequence, tensor)
        self.mesh: DeviceMesh = comm.initialize_mesh_device(self._shape, DIMENSIONS)
        # Public calls only: what flattens dimensions of a DeviceMesh is private in torch.
        self._model = self._across("pipeline", "tensor")
        self._sequence_data = self._across("data", "sequence")

    def _across(self, *dimensions: str) -> dist.ProcessGroup:
        """This rank's group over two dimensions together. Every rank makes all groups, in one order."""
        chosen = [DIMENSIONS.index(name) for name in dimensions]
        rest = [index for index in range(len(DIMENSIONS)) if index not in chosen]
        size = math.prod(self._shape[index] for index in chosen)
        rows = torch.arange(comm.get_world_size()).reshape(self._shape).permute(*rest, *chosen)
        mine = None
        for row in rows.reshape(-1, size).tolist():
            group = comm.new_group(row)
            if comm.get_rank() in row:
                mine = group
        assert mine is not None
        return mine

    def _size(self, dimension: str) -> int:
        return self._shape[DIMENSIONS.index(dimension)]

    def _rank(self, dimension: str) -> int:
        return self.mesh.get_local_rank(dimension)

    # ---------------------------------------------------------------- data

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters and see different samples."""
        return self.mesh.get_group("data")

    def get_data_parallel_world_size(self) -> int:
        return self._size("data")

    def get_data_parallel_rank(self) -> int:
        return self._rank("data")

    def get_data_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return dist.get_global_rank(self.get_data_parallel_group(), 0)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    # ---------------------------------------------------------------- model: tensor x pipeline

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold one copy of the model together: tensor- and pipeline-parallel ones."""
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._size("tensor") * self._size("pipeline")

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self._model)

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that a layer is divided over."""
        return self.mesh.get_group("tensor")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._size("tensor")

    def get_tensor_model_parallel_rank(self) -> int:
        return self._rank("tensor")

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return dist.get_global_rank(self.get_tensor_model_parallel_group(), 0)

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that the layers are divided over."""
        return self.mesh.get_group("pipeline")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._size("pipeline")

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._rank("pipeline")

    def is_pipeline_first_stage(self) -> bool:
        """Whether this rank holds the first layers."""
        return self._rank("pipeline") == 0

    def is_pipeline_last_stage(self) -> bool:
        """Whether this rank holds the last layers."""
        return self._rank("pipeline") == self._size("pipeline") - 1

    # ---------------------------------------------------------------- sequence

    def get_sequence_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that a sample is divided over."""
        return self.mesh.get_group("sequence")

    def get_sequence_parallel_world_size(self) -> int:
        return self._size("sequence")

    def get_sequence_parallel_rank(self) -> int:
        return self._rank("sequence")

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters: data- and sequence-parallel ones together."""
        return self._sequence_data

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._size("sequence") * self._size("data")

    def get_sequence_data_parallel_rank(self) -> int:
        return dist.get_rank(self._sequence_data)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}={size}" for name, size in zip(DIMENSIONS, self._shape, strict=True))
        return f"ProcessGrid({sizes})"
