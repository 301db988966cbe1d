"""How parameters are placed in a flat buffer and how the buffer is cut between ranks.

Pure arithmetic on element counts, no tensors. The rules (docs/decisions/0001-flat-buffers.md):

- parameters stand one after the other, each starting at a multiple of `align` elements;
- a bucket is a run of whole parameters, closed when the next one would exceed `bucket_size`;
- a bucket is padded to a multiple of `partitions x align`, so that each rank owns an equal, aligned slice;
- a rank's shard is the concatenation of its slices, in bucket order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xtrain.backends.alignment import round_up


class Piece(NamedTuple):
    """A run of one parameter's elements that one rank owns.

    `member`: position of the parameter in the layout; `start`, `stop`: elements within the parameter;
    `shard_start`: where the run begins in the rank's shard.
    """

    member: int
    start: int
    stop: int
    shard_start: int


@dataclass(frozen=True)
class Bucket:
    """Elements [start, stop) of the flat buffer; `members` are positions of the parameters in it."""

    start: int
    stop: int
    members: range


@dataclass(frozen=True)
class Layout:
    """Where everything is. `starts[i]`: first element of parameter i in the flat buffer."""

    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    partitions: int

    @property
    def total(self) -> int:
        """Elements of the flat buffer, padding included."""
        return self.buckets[-1].stop if self.buckets else 0

    def owned(self, bucket: Bucket, partition: int) -> tuple[int, int]:
        """The slice [start, stop) of the flat buffer that a rank owns in a bucket."""
        width = (bucket.stop - bucket.start) // self.partitions
        start = bucket.start + partition * width
        return start, start + width

    def holders(self, bucket: Bucket, member: int) -> list[tuple[int, int, int]]:
        """Who owns which elements of a parameter: [(partition, start, stop)], in order."""
        if not self.sizes[member]:
            return []
        width = (bucket.stop - bucket.start) // self.partitions
        first = self.starts[member] - bucket.start
        last = first + self.sizes[member] - 1
        return [
            (n, max(0, n * width - first), min(self.sizes[member], (n + 1) * width - first))
            for n in range(first // width, last // width + 1)
        ]

    def pieces(self, partition: int) -> list[Piece]:
        """What a rank owns, parameter by parameter, in shard order and without padding."""
        pieces = []
        for bucket in self.buckets:
            low, high = self.owned(bucket, partition)
            shard_base = bucket.start // self.partitions
            for member in bucket.members:
                first = self.starts[member]
                start, stop = max(first, low), min(first + self.sizes[member], high)
                if start < stop:
                    pieces.append(Piece(member, start - first, stop - first, shard_base + start - low))
        return pieces


def cut(
    sizes: Sequence[int], partitions: int, bucket_size: int, align: int, breaks: Collection[int] = ()
) -> Layout:
    """Place parameters of `sizes` elements, in the given order, and cut the buffer.

    Args:
        sizes: elements of each parameter; zero is allowed.
        partitions: number of ranks that share the states (1: nothing is divided).
        bucket_size: elements a bucket may hold before padding; a larger parameter has a bucket of its own.
        align: elements; starts of parameters and of slices are multiples of it.
        breaks: positions of parameters that start a new bucket in any case.
    """
    starts: list[int] = []
    buckets: list[Bucket] = []
    bucket_start = position = first_member = 0

    def close(next_member: int) -> None:
        nonlocal bucket_start, position, first_member
        stop = bucket_start + round_up(position - bucket_start, partitions * align)
        buckets.append(Bucket(bucket_start, stop, range(first_member, next_member)))
        bucket_start = position = stop
        first_member = next_member

    for member, size in enumerate(sizes):
        start = round_up(position, align)
        if member > first_member and (start + size - bucket_start > bucket_size or member in breaks):
            close(member)
            start = position
        starts.append(start)
        position = start + size
    if sizes:
        close(len(sizes))
    return Layout(tuple(sizes), tuple(starts), tuple(buckets), partitions)
