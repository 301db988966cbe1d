"""The flat group of ZeRO stage 3: a rank keeps its slice of every bucket, whole buckets are transient.

A bucket here is what one module group (units.py) has in one flat group. Its whole buffer keeps one
storage object for good, whose memory comes and goes: tensors that autograd has saved (a transposed
weight, say) are views of that storage and are valid again when it has been gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.zero.flat import Allocate, FlatGroup, FlatOptions
from xtrain.zero.home import Home, describe_partitioned, empty_out, fill_in, whole
from xtrain.zero.layout import Bucket


class ShardedGroup(FlatGroup):
    """Parameters of one optimizer group and dtype (or frozen ones of one dtype), divided over ranks.

    Attributes:
        shard: (total / partitions,) parameter dtype: this rank's slices, bucket after bucket.
    """

    def __init__(
        self,
        members: Sequence[tuple[str, torch.nn.Parameter]],
        group_index: int,
        options: FlatOptions,
        trainable: bool,
        process_group: dist.ProcessGroup | None,
        source: int,
        allocate: Allocate | None = None,
    ) -> None:
        self.source = source
        self._allocate = allocate
        self._trainable = trainable
        super().__init__(members, group_index, options, process_group)

    def _take_over(self) -> None:
        """Keep this rank's slice of the first rank's values, bucket by bucket."""
        elements = self.layout.total // self.layout.partitions
        if self._allocate is None:
            self.shard = torch.zeros(elements, dtype=self.dtype, device=self.device)
        else:
            self.shard = self._allocate(elements, self.dtype)
        self._full = {bucket.start: self._without_memory(bucket) for bucket in self.layout.buckets}
        for bucket in self.layout.buckets:
            full = torch.zeros(bucket.stop - bucket.start, dtype=self.dtype, device=self.device)
            for member in bucket.members:
                param = self.members[member]
                with whole(param) as data:
                    self._view(full, bucket, member).copy_(data)
                describe_partitioned(param, self.shapes[member])
                empty_out(param)
            if full.numel() and self.layout.partitions > 1:
                comm.broadcast(full.view(torch.uint8), self.source, group=self.process_group)
            width = full.numel() // self.layout.partitions
            self.slice_of(bucket).copy_(full[self.partition * width :][:width])

    def _without_memory(self, bucket: Bucket) -> torch.Tensor:
        full = torch.empty(bucket.stop - bucket.start, dtype=self.dtype, device=self.device)
        full.untyped_storage().resize_(0)
        return full

    def _make_masters(self, allocate: Allocate | None) -> list[torch.nn.Parameter]:
        return super()._make_masters(allocate) if self._trainable else []

    def _view(self, full: torch.Tensor, bucket: Bucket, member: int) -> torch.Tensor:
        start = self.layout.starts[member] - bucket.start
        return full[start : start + self.layout.sizes[member]].view(self.shapes[member])

    def slice_of(self, bucket: Bucket) -> torch.Tensor:
        n = self.layout.partitions
        return self.shard[bucket.start // n : bucket.stop // n]

    def move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        shared = self._masters_in_parameters()
        self.shard = place(self.shard)
        self._share_masters(shared)

    def readopt(self) -> None:
        """Nothing to do: between uses parameters have no data that could be replaced."""

    def store(self, member: int, data: torch.Tensor) -> None:
        param = self.members[member]
        if param.numel() and param.data_ptr() != data.data_ptr():
            param.data.copy_(data.view(self.shapes[member]))
        if (found := self.piece_of(member)) is not None:
            piece, _, _ = found
            mine = data.reshape(-1)[piece.start : piece.stop]
            self.shard[piece.shard_start : piece.shard_start + mine.numel()].copy_(mine)
        self._store_master(member, data)

    def publish(self) -> list[Any]:
        """Round the masters into the shard; whole parameters are gathered when they are used."""
        for number, master in enumerate(self.masters):
            if master.data_ptr() != (mine := self.weights_of(number)).data_ptr():
                mine.copy_(master.data)
        return []

    # ---------------------------------------------------------------- one bucket, whole for a while

    def launch(self, bucket: Bucket, process_group: dist.ProcessGroup | None) -> Any:
        """Give the bucket memory and start gathering into it; returns work to wait for, or None."""
        full = self._full[bucket.start]
        full.untyped_storage().resize_(full.nbytes)
        mine = self.slice_of(bucket).to(self.device)
        if self.layout.partitions == 1:
            full.copy_(mine)
            return None
        return comm.SliceGather(full, mine, process_group)

    def attach(self, bucket: Bucket) -> None:
        """Let the parameters have the gathered data."""
        full = self._full[bucket.start]
        for member in bucket.members:
            fill_in(self.members[member], self._view(full, bucket, member))

    def release(self, bucket: Bucket) -> None:
        """Give the bucket's memory back."""
        for member in bucket.members:
            empty_out(self.members[member])
        self._full[bucket.start].untyped_storage().resize_(0)

    def gather_one(self, member: int) -> torch.Tensor:
        """A copy of one parameter's whole data, for when no engine runs the model. Collective."""
        bucket = self.layout.buckets[self._bucket_of[member]]
        if (work := self.launch(bucket, self.process_group)) is not None:
            work.wait()
        full = self._full[bucket.start]
        copy = self._view(full, bucket, member).clone()
        full.untyped_storage().resize_(0)
        return copy


class FormerHome(Home):
    """A parameter whose engine was detached: still divided, until another engine takes it over."""

    def __init__(self, group: ShardedGroup, member: int) -> None:
        self.group = group
        self.member = member
        self.shape = group.shapes[member]
        self.process_group = group.process_group
        self._users = 0

    def hold(self) -> None:
        self._users += 1
        if self._users == 1:
            fill_in(self.group.members[self.member], self.group.gather_one(self.member))

    def drop(self) -> None:
        self._users -= 1
        if self._users == 0:
            empty_out(self.group.members[self.member])

    def store(self, whole: torch.Tensor) -> None:
        self.group.store(self.member, whole)
