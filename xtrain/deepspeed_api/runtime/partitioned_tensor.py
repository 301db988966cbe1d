"""`deepspeed.runtime.utils.PartitionedTensor`: a tensor of which each rank of a group keeps a run of elements."""

from __future__ import annotations

from typing import Any

import torch

from xtrain import comm
from xtrain.base.errors import ConfigError
from xtrain.comm import ProcessGroup


class PartitionedTensor:
    """A tensor cut into equal runs of its elements, the first ones longer by one where they do not divide.

    Args:
        tensor: the whole, equal on all ranks of the group.
        group: the ranks that share it.
        partition_meta: another one's `to_meta()`, whose run `tensor` is; None: `tensor` is the whole.

    Attributes:
        local_data: this rank's run, one-dimensional, with the tensor's dtype.
        orig_size: the shape of the whole.
        partition: positions at which the runs begin, and the end.
        num_parts, rank: of the group.
    """

    def __init__(
        self, tensor: torch.Tensor, group: ProcessGroup, partition_meta: torch.Tensor | None = None
    ) -> None:
        self.group = group
        self.num_parts, self.rank = comm.get_world_size(group), comm.get_rank(group)
        if partition_meta is None:
            self.orig_size = list(tensor.shape)
            self.partition = _bounds(tensor.numel(), self.num_parts)
            start, stop = self.partition[self.rank : self.rank + 2]
            self.local_data = tensor.detach().reshape(-1)[start:stop].clone()
        else:
            self._read(partition_meta)
            self.local_data = tensor
        self.orig_device = tensor.device

    def _read(self, meta: torch.Tensor) -> None:
        numbers = [int(number) for number in meta.tolist()]
        axes = numbers[0]
        self.orig_size, (parts, _), self.partition = (
            numbers[1 : 1 + axes],
            numbers[1 + axes : 3 + axes],
            numbers[3 + axes :],
        )
        if parts != self.num_parts:
            raise ConfigError(
                f"the tensor was divided over {parts} ranks, and the group has {self.num_parts}"
            )

    @classmethod
    def from_meta(
        cls, meta: torch.Tensor, local_part: torch.Tensor, group: ProcessGroup, device: Any = None
    ) -> PartitionedTensor:
        """The same tensor from its description and this rank's run, as they were sent over."""
        return cls(local_part if device is None else local_part.to(device), group, meta)

    def to_meta(self) -> torch.Tensor:
        """An int64 vector: number of axes, shape, ranks, this rank, and the positions of the runs."""
        numbers = [len(self.orig_size), *self.orig_size, self.num_parts, self.rank, *self.partition]
        return torch.tensor(numbers, dtype=torch.int64, device=self.orig_device)

    def data(self) -> torch.Tensor:
        """This rank's run."""
        return self.local_data

    def local_size(self) -> torch.Size:
        """Its shape."""
        return self.local_data.size()

    def full_size(self) -> list[int]:
        """Shape of the whole."""
        return self.orig_size

    def full(self, device: Any = None) -> torch.Tensor:
        """The whole, on `device` (None: where the run is); every rank of the group calls it."""
        lengths = [stop - start for start, stop in zip(self.partition, self.partition[1:], strict=False)]
        longest = max(lengths)
        padded = self.local_data.new_zeros(longest)
        padded[: self.local_data.numel()] = self.local_data
        gathered = self.local_data.new_empty(longest * self.num_parts)
        comm.all_gather_into_tensor(gathered, padded, group=self.group)
        runs = [run[:length] for run, length in zip(gathered.split(longest), lengths, strict=True)]
        whole = torch.cat(runs).view(self.orig_size)
        return whole if device is None else whole.to(device)


def _bounds(elements: int, parts: int) -> list[int]:
    length, longer = divmod(elements, parts)
    return [part * length + min(part, longer) for part in range(parts + 1)]
