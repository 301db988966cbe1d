"""Which elements of which parameters a master slice holds: for optimizers that need whole parameters, and for the norm.

What an optimizer does with that is its own affair (xtrain/optim/parameterwise.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.optim.parameterwise import Fragment, ParamFragments
from xtrain.parallel.grid import ModelParallel, counted_once
from xtrain.zero.flat import FlatGroup


def _of_group(group: FlatGroup) -> list[ParamFragments]:
    if group.by_parameter:
        wholes = [Fragment(0, 0, shape.numel()) for shape in group.shapes]
        return [
            ParamFragments(parameter, shape, master, 0, run, (run,))
            for parameter, shape, master, run in zip(
                group.members, group.shapes, group.masters, wholes, strict=True
            )
        ]
    layout, mine = group.layout, group.partition
    result = []
    for bucket, master in zip(layout.buckets, group.masters, strict=True):
        low = layout.owned(bucket, mine)[0]
        for member in bucket.members:
            fragments = tuple(Fragment(*holder) for holder in layout.holders(bucket, member))
            own = next((part for part in fragments if part.rank == mine), Fragment(mine, 0, 0))
            result.append(
                ParamFragments(
                    parameter=group.members[member],
                    shape=group.shapes[member],
                    tensor=master,
                    offset=max(0, layout.starts[member] - low) if own.length else 0,
                    own=own,
                    fragments=fragments,
                )
            )
    return result


def param_fragments(groups: Sequence[FlatGroup], param_groups: int) -> list[list[ParamFragments]]:
    """For each of the optimizer's parameter groups, its parameters in an order that all ranks share."""
    result: list[list[ParamFragments]] = [[] for _ in range(param_groups)]
    for group in groups:
        result[group.group_index] += _of_group(group)
    return result


def counted_parts(group: FlatGroup, model: ModelParallel) -> list[list[tuple[int, int, bool]]]:
    """For each of the group's masters: (start, stop, whether it counts in the gradient norm), in order.

    A slice of which everything counts, padding included, is one part.
    """
    if group.by_parameter:
        return [[(0, param.numel(), counted_once(param, model))] for param in group.members]
    others = [
        piece
        for piece in group.layout.pieces(group.partition)
        if not counted_once(group.members[piece.member], model)
    ]
    result = []
    for bucket in group.layout.buckets:
        base = bucket.start // group.layout.partitions
        position, size = 0, bucket.stop // group.layout.partitions - base
        parts = []
        for piece in others:
            start = piece.shard_start - base
            if 0 <= start < size:
                stop = start + piece.stop - piece.start
                parts += [(position, start, True), (start, stop, False)]
                position = stop
        parts.append((position, size, True))
        result.append([part for part in parts if part[0] < part[1]])
    return result
