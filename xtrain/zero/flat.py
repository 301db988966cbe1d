"""The state of one flat group: parameters and master weights of equal dtype and options.

Parameters stay ordinary tensors whose storage is a slice of `params`. Gradients live in gradients.py;
when to reduce or gather is decided in reducer.py and optimizer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xtrain.zero.layout import Bucket, Layout, Piece, cut


@dataclass(frozen=True)
class FlatOptions:
    """How to cut: `partitions` ranks share the optimizer states, `partition` is this rank's number.

    `align`: elements at a multiple of which every parameter and slice starts.
    """

    partitions: int
    partition: int
    bucket_size: int
    align: int


class FlatGroup:
    """Parameters of one optimizer group and dtype, in one buffer.

    Attributes:
        names, members: the parameters in buffer order (reverse of registration, the order in which
            their gradients arrive).
        shapes: theirs.
        params: (total,) parameter dtype.
        masters: per bucket, this rank's slice in float32 (float64 for float64 parameters); views of
            `params` when the dtypes are the same.
    """

    def __init__(
        self, members: Sequence[tuple[str, torch.nn.Parameter]], group_index: int, options: FlatOptions
    ) -> None:
        self.names = [name for name, _ in members]
        self.members = [param for _, param in members]
        self.shapes = [param.shape for param in self.members]
        self.group_index = group_index
        self.partition = options.partition
        dtype, device = self.members[0].dtype, self.members[0].device
        sizes = [shape.numel() for shape in self.shapes]
        self.layout: Layout = cut(sizes, options.partitions, options.bucket_size, options.align)
        self._pieces = {piece.member: piece for piece in self.layout.pieces(self.partition)}
        self._bucket_of = {
            member: number for number, bucket in enumerate(self.layout.buckets) for member in bucket.members
        }
        self.params = torch.zeros(self.layout.total, dtype=dtype, device=device)
        for member, param in enumerate(self.members):
            view = self.member_view(self.params, member)
            view.copy_(param.detach())
            param.data = view
        self.masters = self._make_masters()

    def member_view(self, buffer: torch.Tensor, member: int) -> torch.Tensor:
        """One parameter's part of a buffer that is laid out like `params`, in the parameter's shape."""
        start = self.layout.starts[member]
        return buffer[start : start + self.layout.sizes[member]].view(self.shapes[member])

    def owned(self, buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """This rank's slice of a bucket of a buffer that is laid out like `params`."""
        start, stop = self.layout.owned(bucket, self.partition)
        return buffer[start:stop]

    def piece_of(self, member: int) -> tuple[Piece, Bucket, torch.nn.Parameter | None] | None:
        """What this rank owns of a parameter, with its bucket and its master; None when it owns nothing."""
        piece = self._pieces.get(member)
        if piece is None:
            return None
        number = self._bucket_of[member]
        return piece, self.layout.buckets[number], self.masters[number]

    def store(self, member: int, data: torch.Tensor) -> None:
        """Set one parameter, its master included, from its whole value; not collective."""
        self.member_view(self.params, member).copy_(data.view(self.shapes[member]))
        self._store_master(member, data)

    def _store_master(self, member: int, data: torch.Tensor) -> None:
        if (found := self.piece_of(member)) is not None:
            piece, bucket, master = found
            if master is not None:
                start = piece.shard_start - bucket.start // self.layout.partitions
                mine = data.reshape(-1)[piece.start : piece.stop]
                master.data[start : start + mine.numel()].copy_(mine)

    def _make_masters(self) -> list[torch.nn.Parameter]:
        # `to` returns the view itself when the dtype is the same.
        dtype = torch.promote_types(self.params.dtype, torch.float32)
        return [
            torch.nn.Parameter(self.owned(self.params, bucket).to(dtype), requires_grad=False)
            for bucket in self.layout.buckets
        ]

    def refresh_masters(self) -> None:
        """Set the masters from the parameters (after the module's weights were loaded or broadcast)."""
        for bucket, master in zip(self.layout.buckets, self.masters, strict=True):
            master.data.copy_(self.owned(self.params, bucket))

    def publish_masters(self) -> None:
        """Round the masters into this rank's slices of the parameters."""
        for bucket, master in zip(self.layout.buckets, self.masters, strict=True):
            if master.dtype != self.params.dtype:
                self.owned(self.params, bucket).copy_(master.data)
