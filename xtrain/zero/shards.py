"""The flat group of ZeRO stage 3: a rank keeps its slice of every bucket, whole buckets are transient.

A bucket here is what one param group (param groups.py) has in one flat group. Its whole buffer keeps one
storage object for good, whose memory comes and goes: tensors that autograd has saved (a transposed
weight, say) are views of that storage and are valid again when it has been gathered again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.zero.flat import Allocate, FlatGroup, FlatOptions
from xtrain.zero.home import Home, ZeroParamStatus, describe_partitioned, empty_out, fill_in, set_home, whole
from xtrain.zero.layout import Bucket


class ShardedGroup(FlatGroup):
    """Parameters of one optimizer group and dtype (or frozen ones of one dtype), divided over ranks.

    Attributes:
        shard: (total / partitions,) parameter dtype: this rank's slices, bucket after bucket.
        lent: members that a script has whole, each in a tensor of its own, and how often. What happens to their
            bucket does not touch them.
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
        self.lent: Counter[int] = Counter()
        self._hollow: list[torch.nn.Parameter] = []
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

    def _place(self, bucket: Bucket, member: int) -> int:
        """Bytes from the start of a bucket to a member."""
        return (self.layout.starts[member] - bucket.start) * self.dtype.itemsize

    def slice_of(self, bucket: Bucket) -> torch.Tensor:
        self._adopt(bucket)
        n = self.layout.partitions
        return self.shard[bucket.start // n : bucket.stop // n]

    def move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        shared = self._masters_in_parameters()
        self.shard = place(self.shard)
        self._share_masters(shared)

    def readopt(self) -> None:
        """Take over data that a script has given to parameters, or to the parts of them that this rank keeps."""
        for bucket in self.layout.buckets:
            self._adopt(bucket)

    def _adopt(self, bucket: Bucket) -> None:
        """`readopt` for one bucket: whoever wants the slice of a bucket gets it with that."""
        if not self._shown:
            return  # they have not been shown to any script
        for member in bucket.members:
            self._adopt_piece(member)
            param = self.members[member]
            if (
                param.numel()
                and param.ds_status is ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
                and param.untyped_storage().nbytes()  # else it keeps its shape only
            ):
                self._adopt_data(member)
                empty_out(param)

    def _adopt_data(self, member: int) -> None:
        self._check_replaced(member)
        if member in self._shown:
            self._shown[member].copy_(self.members[member].data.reshape(-1)[self.own_range(member)])

    def store(self, member: int, data: torch.Tensor) -> None:
        param = self.members[member]
        places = [param.data] if param.ds_status is ZeroParamStatus.AVAILABLE else []  # type: ignore[attr-defined]
        if (
            member in self.lent
            and self._full[(bucket := self._bucket(member)).start].untyped_storage().nbytes()
        ):
            places.append(self._view(self._full[bucket.start], bucket, member))
        for place in places:
            if place.data_ptr() != data.data_ptr():
                place.copy_(data.view(self.shapes[member]))
        if (mine := self.in_shard(member, self.shard)) is not None:
            mine.copy_(data.reshape(-1)[self.own_range(member)])
        self._store_master(member, data)

    def publish(self) -> list[Any]:
        """Round the masters into the shard; whole parameters are gathered when they are used."""
        for number, master in enumerate(self.masters):
            if master.data_ptr() != (mine := self.weights_of(number)).data_ptr():
                mine.copy_(master.data)
        return []

    # ---------------------------------------------------------------- one bucket, whole for a while

    def _whole_buffer(self, bucket: Bucket) -> torch.Tensor:
        """Where the bucket is whole: on one rank its slice is the bucket."""
        if self.layout.partitions == 1 and self.shard.device == self.device:
            return self.slice_of(bucket)
        return self._full[bucket.start]

    def launch(self, bucket: Bucket, process_group: dist.ProcessGroup | None, channel: int = 0) -> Any:
        """Give the bucket memory and start gathering into it; returns work to wait for, or None.

        Args:
            channel: gathers of different ones need not meet in order where messages are direct.
        """
        mine = self.slice_of(bucket)
        if self.layout.partitions == 1 and mine.device == self.device:
            return None
        full = self._full[bucket.start]
        full.untyped_storage().resize_(full.nbytes)
        if self.layout.partitions == 1:
            full.copy_(mine)
            return None
        return comm.SliceGather(full, mine.to(self.device), process_group, 1 + channel)

    def attach(self, bucket: Bucket) -> None:
        """Let the parameters have the gathered data."""
        full = self._whole_buffer(bucket)
        for member in bucket.members:
            if member not in self.lent:
                fill_in(self.members[member], self._view(full, bucket, member))

    def free(self, bucket: Bucket) -> None:
        """Give the bucket's memory back.

        Within a backward, frozen parameters stay empty shells of their shape until it ends: when a checkpointed
        function (`use_reentrant=False`) has been run again, torch compares the shapes of what was saved, and it
        saves a tensor that needs no gradient as it is.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        full = self._whole_buffer(bucket)
        for member in bucket.members:
            if member in self.lent:
                continue
            param = self.members[member]
            if self.layout.sizes[member] and param.data_ptr() != full.data_ptr() + self._place(
                bucket, member
            ):
                self._adopt_data(member)  # a script has replaced it while it was whole
            if in_backward and not param.requires_grad:
                self._keep_shape(param)
            else:
                empty_out(param)
        self._full[bucket.start].untyped_storage().resize_(0)

    def give_shape(self, member: int) -> None:
        """In a backward: let an empty parameter have its shape, for a gradient that comes while it is divided.

        So it does where a script has computed something from parameters that it had gathered. torch lays a gradient
        out like its parameter, of which it needs no data.
        """
        param = self.members[member]
        if param.ds_status is ZeroParamStatus.NOT_AVAILABLE and not param.numel():  # type: ignore[attr-defined]
            param.data = torch.empty(self.shapes[member], dtype=self.dtype, device=self.device)
            param.untyped_storage().resize_(0)
            self._keep_shape(param)

    def _keep_shape(self, param: torch.nn.Parameter) -> None:
        param.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]
        if not self._hollow:
            torch.autograd.Variable._execution_engine.queue_callback(self.empty_hollow)
        self._hollow.append(param)

    def empty_hollow(self) -> None:
        """A backward has ended: no parameter keeps its shape without its data."""
        hollow, self._hollow = self._hollow, []
        for param in hollow:
            if param.ds_status is ZeroParamStatus.NOT_AVAILABLE:  # type: ignore[attr-defined]
                empty_out(param)

    # ---------------------------------------------------------------- some parameters without their bucket

    def _widths(self, members: Sequence[int]) -> list[int]:
        """How many elements of the members each rank has."""
        widths = [0] * self.layout.partitions
        for member in members:
            for rank, start, stop in self.layout.holders(self._bucket(member), member):
                widths[rank] += stop - start
        return widths

    def _bucket(self, member: int) -> Bucket:
        return self.layout.buckets[self._bucket_of[member]]

    def elements_to_gather(self, members: Sequence[int]) -> int:
        """Elements of the message that `gather_members` moves."""
        widths = self._widths(members)
        return max(widths) * (1 if sum(width > 0 for width in widths) < 2 else len(widths))

    def gather_members(
        self, members: Sequence[int], process_group: dist.ProcessGroup | None
    ) -> list[torch.Tensor]:
        """Copies of some parameters' whole data. Collective; moves hardly more than these parameters."""
        widths = self._widths(members)
        holders = [rank for rank, width in enumerate(widths) if width]
        pieces = [self.own_piece(member).to(self.device) for member in members]
        mine = torch.cat([torch.empty(0, dtype=self.dtype, device=self.device), *pieces])
        if len(holders) < 2:
            rows = {
                rank: mine if rank == self.partition else mine.new_empty(widths[rank]) for rank in holders
            }
            if holders and self.layout.partitions > 1:
                source = (
                    holders[0] if process_group is None else dist.get_global_rank(process_group, holders[0])
                )
                comm.broadcast(rows[holders[0]].view(torch.uint8), source, group=process_group)
        else:
            gathered = mine.new_empty(len(widths), max(widths))
            gathered[self.partition, : len(mine)] = mine
            comm.SliceGather(gathered.view(-1), gathered[self.partition], process_group).wait()
            rows = dict(enumerate(gathered.unbind()))
        return self._assemble(members, rows)

    def _assemble(self, members: Sequence[int], rows: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """Whole parameters from what each rank has of them, one after the other."""
        whole_ones, taken = [], dict.fromkeys(rows, 0)
        for member in members:
            data = torch.empty(self.layout.sizes[member], dtype=self.dtype, device=self.device)
            for rank, start, stop in self.layout.holders(self._bucket(member), member):
                data[start:stop] = rows[rank][taken[rank] : taken[rank] + stop - start]
                taken[rank] += stop - start
            whole_ones.append(data.view(self.shapes[member]))
        return whole_ones

    def lend(self, members: Sequence[int], process_group: dist.ProcessGroup | None) -> None:
        """Make members whole for a script, each in a tensor of its own, until they are taken back. Collective."""
        new = [member for member in members if member not in self.lent]
        for member, data in zip(new, self.gather_members(new, process_group), strict=True):
            fill_in(self.members[member], data)
        self.lent.update(members)

    def take_back(self, member: int, is_whole: bool) -> None:
        """Undo one `lend`; `is_whole`: the bucket is, for somebody else."""
        self.lent[member] -= 1
        if self.lent[member]:
            return
        del self.lent[member]
        bucket = self._bucket(member)
        if is_whole:
            fill_in(self.members[member], self._view(self._whole_buffer(bucket), bucket, member))
        else:
            empty_out(self.members[member])

    def let_go(self, bucket: Bucket) -> None:
        """Its engine is gone: the parameters stay divided until another one takes them over, one by one."""
        self.readopt()
        self._shown = {}  # from now on, data that a parameter has are its new owner's
        for member in bucket.members:
            set_home(self.members[member], FormerHome(self, member))


class FormerHome(Home):
    """A parameter whose engine was detached: still divided, until another engine takes it over."""

    def __init__(self, group: ShardedGroup, member: int) -> None:
        self.group = group
        self.member = member
        self.shape = group.shapes[member]
        self.process_group = group.process_group
        self._users = 0

    def unshard(self) -> None:
        self._users += 1
        if self._users == 1:
            fill_in(
                self.group.members[self.member],
                self.group.gather_members([self.member], self.process_group)[0],
            )

    def reshard(self) -> None:
        self._users -= 1
        if self._users == 0:
            empty_out(self.group.members[self.member])

    def store(self, whole: torch.Tensor) -> None:
        self.group.store(self.member, whole)
