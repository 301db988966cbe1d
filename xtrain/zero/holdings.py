"""Tells a parameterwise optimizer which elements of which parameters its master slices hold, on every rank.

What an optimizer does with that is its own affair (xtrain/optim/parameterwise.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.optim.parameterwise import Holding, Run
from xtrain.zero.flat import FlatGroup


def _of_group(group: FlatGroup) -> list[Holding]:
    layout, mine = group.layout, group.partition
    result = []
    for bucket, master in zip(layout.buckets, group.masters, strict=True):
        low = layout.owned(bucket, mine)[0]
        for member in bucket.members:
            runs = tuple(Run(*holder) for holder in layout.holders(bucket, member))
            own = next((run for run in runs if run.rank == mine), Run(mine, 0, 0))
            result.append(
                Holding(
                    parameter=group.members[member],
                    shape=group.shapes[member],
                    tensor=master,
                    offset=max(0, layout.starts[member] - low) if own.length else 0,
                    own=own,
                    runs=runs,
                )
            )
    return result


def holdings(groups: Sequence[FlatGroup], param_groups: int) -> list[list[Holding]]:
    """For each of the optimizer's parameter groups, its parameters in an order that all ranks share."""
    result: list[list[Holding]] = [[] for _ in range(param_groups)]
    for group in groups:
        result[group.group_index] += _of_group(group)
    return result
