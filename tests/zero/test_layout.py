"""The cut of flat buffers, for arbitrary parameter sizes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xtrain.zero.layout import Layout, cut

sizes = st.lists(st.integers(0, 500), min_size=1, max_size=30)
partitions = st.integers(1, 9)
bucket_sizes = st.integers(1, 1500)
aligns = st.sampled_from([1, 4, 16, 32])


@given(sizes, partitions, bucket_sizes, aligns)
def test_every_element_is_owned_exactly_once(sizes: list[int], n: int, bucket: int, align: int) -> None:
    layout = cut(sizes, n, bucket, align)
    owners = [[0] * size for size in sizes]
    for partition in range(n):
        for piece in layout.pieces(partition):
            for element in range(piece.start, piece.stop):
                owners[piece.member][element] += 1
    assert all(count == 1 for counts in owners for count in counts)


@given(sizes, partitions, bucket_sizes, aligns)
def test_parameters_are_aligned_and_do_not_overlap(sizes: list[int], n: int, bucket: int, align: int) -> None:
    layout = cut(sizes, n, bucket, align)
    assert all(start % align == 0 for start in layout.starts)
    ends = [start + size for start, size in zip(layout.starts, sizes, strict=True)]
    assert all(end <= start for end, start in zip(ends, layout.starts[1:], strict=False))
    assert ends[-1] <= layout.total


@given(sizes, partitions, bucket_sizes, aligns)
def test_slices_are_equal_and_aligned(sizes: list[int], n: int, bucket: int, align: int) -> None:
    layout = cut(sizes, n, bucket, align)
    for item in layout.buckets:
        widths = {stop - start for start, stop in (layout.owned(item, p) for p in range(n))}
        assert len(widths) == 1
        assert widths.pop() % align == 0
    assert layout.total % n == 0


@given(sizes, partitions, bucket_sizes, aligns)
def test_buckets_hold_whole_parameters_up_to_their_size(
    sizes: list[int], n: int, bucket: int, align: int
) -> None:
    layout = cut(sizes, n, bucket, align)
    assert [member for item in layout.buckets for member in item.members] == list(range(len(sizes)))
    for item in layout.buckets:
        last = item.members[-1]
        used = layout.starts[last] + sizes[last] - item.start
        assert used <= bucket or len(item.members) == 1
        assert item.stop - item.start - used < n * align


@given(sizes, bucket_sizes, aligns)
def test_shard_positions_follow_the_slices(sizes: list[int], bucket: int, align: int) -> None:
    """What pieces() says about the shard is where concatenated slices put the elements."""
    layout: Layout = cut(sizes, 3, bucket, align)
    position = {}
    for partition in range(3):
        offset = 0
        for item in layout.buckets:
            start, stop = layout.owned(item, partition)
            for element in range(start, stop):
                position[element] = (partition, offset + element - start)
            offset += stop - start
    for partition in range(3):
        for piece in layout.pieces(partition):
            first = layout.starts[piece.member] + piece.start
            assert position[first] == (partition, piece.shard_start)


def test_padding_costs_less_than_one_slice_row() -> None:
    layout = cut([1000, 1000], partitions=4, bucket_size=10_000, align=16)
    assert layout.starts == (0, 1008)
    assert layout.total == 2048
