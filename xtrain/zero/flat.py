"""The state of one flat group: parameters and master weights of equal dtype and options.

Here parameters stay ordinary tensors whose storage is a slice of one buffer (stages 0 to 2); shards.py
has the group of stage 3. Gradients live in gradients.py; when to reduce or gather is decided in
reducer.py and optimizer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.base.errors import ConfigError
from xtrain.zero.home import Home, ZeroParamStatus, full_shape, set_home, whole
from xtrain.zero.layout import Bucket, Layout, cut

Allocate = Callable[[int, torch.dtype], torch.Tensor]
"""(elements, dtype) -> zeros in some kind of memory; see offload.py."""


@dataclass(frozen=True)
class FlatOptions:
    """How to cut: `partitions` ranks share the states, `partition` is this rank's number.

    Attributes:
        align: elements at a multiple of which every parameter and slice starts.
        breaks: positions of members at which a new bucket starts in any case.
        masters: where they are made; None: on the device, or in the parameters when the dtypes agree.
        by_parameter: a master for each parameter, in its shape (stage 0), instead of one for each bucket.
        narrow_masters: 16-bit parameters are their own masters, as in plain PyTorch.
    """

    partitions: int
    partition: int
    bucket_size: int
    align: int
    breaks: Collection[int] = ()
    masters: Allocate | None = None
    by_parameter: bool = False
    narrow_masters: bool = False


class FlatGroup:
    """Parameters of one optimizer group and dtype, in one buffer.

    Attributes:
        names, members: the parameters in buffer order (reverse of registration, the order in which
            their gradients arrive).
        shapes: theirs, also where their data is not there.
        params: (total,) parameter dtype; not in stage 3.
        masters: per bucket, this rank's slice in float32 (float64 for float64 parameters); views of
            the parameters when the dtypes are the same. In stage 0 one per parameter, in its shape: the
            parameter itself when the dtypes are the same.
        process_group: the ranks that share the states.
        align: elements at a multiple of which every parameter and slice starts.
    """

    def __init__(
        self,
        members: Sequence[tuple[str, torch.nn.Parameter]],
        group_index: int,
        options: FlatOptions,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.names = [name for name, _ in members]
        self.members = [param for _, param in members]
        self.shapes = [full_shape(param) for param in self.members]
        self.group_index = group_index
        self.partition = options.partition
        self.process_group = process_group
        self.align = options.align
        self.dtype, self.device = self.members[0].dtype, self.members[0].device
        self.layout: Layout = cut(
            [shape.numel() for shape in self.shapes],
            options.partitions,
            options.bucket_size,
            options.align,
            options.breaks,
        )
        self._pieces = {piece.member: piece for piece in self.layout.pieces(self.partition)}
        self._bucket_of = {
            member: number for number, bucket in enumerate(self.layout.buckets) for member in bucket.members
        }
        self.by_parameter = options.by_parameter
        self._narrow_masters = options.narrow_masters
        self._shown: dict[int, torch.Tensor] = {}
        self._take_over()
        self.masters = self._make_masters(options.masters)

    def _take_over(self) -> None:
        """Move the parameters' data into the buffer."""
        self.params = comm.zeros(self.layout.total, self.dtype, self.device, self.process_group)
        for member, param in enumerate(self.members):
            view = self.member_view(self.params, member)
            with whole(param) as data:
                view.copy_(data)
            param.data = view
            if hasattr(param, "ds_status"):
                param.ds_status = ZeroParamStatus.AVAILABLE
            set_home(param, WholeHome(self, member))

    def member_view(self, buffer: torch.Tensor, member: int) -> torch.Tensor:
        """One parameter's part of a buffer of `layout.total` elements, in the parameter's shape."""
        start = self.layout.starts[member]
        return buffer[start : start + self.layout.sizes[member]].view(self.shapes[member])

    def owned(self, buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """This rank's slice of a bucket of a buffer of `layout.total` elements."""
        start, stop = self.layout.owned(bucket, self.partition)
        return buffer[start:stop]

    def slice_of(self, bucket: Bucket) -> torch.Tensor:
        """This rank's slice of the parameters of a bucket."""
        return self.owned(self.params, bucket)

    def own_range(self, member: int) -> slice:
        """Which elements of a flattened parameter this rank owns: an empty slice for none of them."""
        piece = self._pieces.get(member)
        return slice(0, 0) if piece is None else slice(piece.start, piece.stop)

    def master_of(self, member: int) -> torch.nn.Parameter | None:
        """The master that has this rank's elements of a parameter; None when there are none, or no masters."""
        if member not in self._pieces or not self.masters:
            return None
        return self.masters[member if self.by_parameter else self._bucket_of[member]]

    def in_shard(self, member: int, shard: torch.Tensor, start: int = 0) -> torch.Tensor | None:
        """This rank's elements of a parameter in a shard: its slices one after the other.

        Here alone it is worked out where they are. A view; None when this rank has none of them.

        Args:
            start: elements of the shard that `shard` lacks at its beginning.
        """
        if (piece := self._pieces.get(member)) is None:
            return None
        first = piece.shard_start - start
        return shard[first : first + piece.stop - piece.start]

    def in_slice(self, member: int, of: Callable[[Bucket], torch.Tensor]) -> torch.Tensor | None:
        """`in_shard` for what `of(its bucket)` returns, which is laid out like this rank's slice of that bucket."""
        if member not in self._pieces:
            return None
        bucket = self.layout.buckets[self._bucket_of[member]]
        return self.in_shard(member, of(bucket), bucket.start // self.layout.partitions)

    def in_master(
        self, member: int, of: Callable[[torch.nn.Parameter], torch.Tensor] = lambda master: master.data
    ) -> torch.Tensor | None:
        """The same for what `of(master)` returns, which is laid out like the master: a one-dimensional view."""
        if (master := self.master_of(member)) is None:
            return None
        return of(master).view(-1) if self.by_parameter else self.in_slice(member, lambda _: of(master))

    def own_piece(self, member: int) -> torch.Tensor:
        """What this rank owns of a parameter, which may be nothing: a one-dimensional view."""
        mine = self.in_slice(member, self.slice_of)
        return torch.empty(0, dtype=self.dtype, device=self.device) if mine is None else mine

    def weights_of(self, number: int) -> torch.Tensor:
        """What master `number` is rounded into: a view of the parameters in the master's shape."""
        if self.by_parameter:
            return self.member_view(self.params, number)
        return self.slice_of(self.layout.buckets[number])

    def assemble(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """One tensor in shard order, padding included, out of one for each master."""
        if not self.by_parameter:
            return torch.cat([value.reshape(-1) for value in values])
        shard = values[0].new_zeros(self.layout.total)
        for member, value in enumerate(values):
            self.member_view(shard, member).copy_(value)
        return shard

    def split(self, shard: torch.Tensor) -> list[torch.Tensor]:
        """Undo `assemble`: views, one for each master."""
        if self.by_parameter:
            return [self.member_view(shard, member) for member in range(len(self.members))]
        return list(torch.split(shard, [master.numel() for master in self.masters]))

    def show_pieces(self) -> None:
        """Give every parameter DeepSpeed's attribute `ds_tensor`: what this rank owns of it, which may be nothing."""
        shown = {member: self.own_piece(member) for member in range(len(self.members))}
        for member, mine in shown.items():
            self.members[member].ds_tensor = mine.detach()  # type: ignore[attr-defined]
        self._shown = shown  # stay where they are, whatever a script makes of the others

    def _adopt_piece(self, member: int) -> None:
        """Take over what a script has put in the place of `ds_tensor` or of its data; it is the value from now on.

        Raises:
            ConfigError: it has another size.
        """
        mine, param = self._shown[member], self.members[member]
        shown: torch.Tensor = param.ds_tensor  # type: ignore[attr-defined]
        if shown.data_ptr() == mine.data_ptr():
            return
        if shown.numel() != mine.numel():
            raise ConfigError(
                f"ds_tensor of parameter {self.names[member]!r} was replaced by {shown.numel()} elements, this rank "
                f"keeps {mine.numel()}: give each rank its own part, or set the whole parameter in "
                "zero.GatheredParameters(param, modifier_rank=0)"
            )
        mine.copy_(shown.detach().reshape(-1))
        param.ds_tensor = mine.detach()  # type: ignore[attr-defined]

    def _make_masters(self, allocate: Allocate | None) -> list[torch.nn.Parameter]:
        dtype = self.dtype if self._narrow_masters else torch.promote_types(self.dtype, torch.float32)
        if self.by_parameter and dtype == self.dtype:
            return list(self.members)
        masters = []
        for number in range(len(self.members if self.by_parameter else self.layout.buckets)):
            mine = self.weights_of(number)
            # `to` returns the view itself when the dtype is the same.
            data = mine.to(dtype) if allocate is None else allocate(mine.numel(), dtype).copy_(mine)
            masters.append(torch.nn.Parameter(data, requires_grad=False))
        return masters

    def move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the parameters' storage by what `place` makes of it; masters that share it follow."""
        shared = self._masters_in_parameters()
        self.params = place(self.params)
        for member, param in enumerate(self.members):
            param.data = self.member_view(self.params, member)
        self._share_masters(shared)

    def _masters_in_parameters(self) -> list[int]:
        return [
            number
            for number, master in enumerate(self.masters)
            if master.data_ptr() == self.weights_of(number).data_ptr()
        ]

    def own_masters(self) -> list[torch.nn.Parameter]:
        """Masters that are not views of the parameters."""
        shared = self._masters_in_parameters()
        return [master for number, master in enumerate(self.masters) if number not in shared]

    def _share_masters(self, numbers: list[int]) -> None:
        for number in numbers:
            self.masters[number].data = self.weights_of(number)

    def readopt(self) -> None:
        """Take back parameters whose `.data` a script has replaced (weights put back after an attack, say).

        What the script has set is the value from now on; separate masters keep theirs, as they do when it
        changes a parameter in place.

        Raises:
            ConfigError: the new data has another shape or dtype.
        """
        for member in self._shown:
            self._adopt_piece(member)
        for member, param in enumerate(self.members):
            view = self.member_view(self.params, member)
            if param.data_ptr() == view.data_ptr() or not view.numel():
                continue
            self._check_replaced(member)
            view.copy_(param.data)
            param.data = view

    def _check_replaced(self, member: int) -> None:
        """Whether the data that a script has given a parameter fit."""
        param, shape = self.members[member], self.shapes[member]
        if param.shape != shape or param.dtype != self.dtype:
            raise ConfigError(
                f"the data of parameter {self.names[member]!r} was replaced by {param.dtype} of shape "
                f"{tuple(param.shape)}, the engine trains {self.dtype} of shape {tuple(shape)}: do not "
                "convert the model after initialize()"
            )

    def refresh_masters(self) -> None:
        """Set the masters from the parameters (after the module's weights were loaded or broadcast)."""
        self.readopt()
        for number, master in enumerate(self.masters):
            if master.data_ptr() != (mine := self.weights_of(number)).data_ptr():
                master.data.copy_(mine)

    def store(self, member: int, data: torch.Tensor) -> None:
        """Set one parameter, its master included, from its whole value; not collective."""
        self.member_view(self.params, member).copy_(data.view(self.shapes[member]))
        self._store_master(member, data)

    def _store_master(self, member: int, data: torch.Tensor) -> None:
        if (mine := self.in_master(member)) is not None:
            mine.copy_(data.reshape(-1)[self.own_range(member)])

    def publish(self) -> list[Any]:
        """Round the masters into the parameters and start gathering every rank's slices."""
        for number, master in enumerate(self.masters):
            if master.data_ptr() != (mine := self.weights_of(number)).data_ptr():
                mine.copy_(master.data)
        if self.layout.partitions == 1:
            return []
        return [
            comm.SliceGather(
                self.params[bucket.start : bucket.stop], self.slice_of(bucket), self.process_group
            )
            for bucket in self.layout.buckets
        ]


class WholeHome(Home):
    """A parameter whose data is always whole."""

    def __init__(self, group: FlatGroup, member: int) -> None:
        self.group = group
        self.member = member
        self.shape = group.shapes[member]
        self.process_group = group.process_group

    def unshard(self) -> None:
        """Nothing to do."""

    def reshard(self) -> None:
        """Nothing to do."""

    def store(self, whole: torch.Tensor) -> None:
        self.group.store(self.member, whole)
