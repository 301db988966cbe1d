"""Machines, and which ranks each of them gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """A machine that ranks run on.

    Attributes:
        name: as ssh or srun know it; "localhost" is this machine, without ssh.
        slots: ranks that it gets.
        devices: numbers of the devices that its ranks may see, one a rank; None: all, in order.
    """

    name: str
    slots: int
    devices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Placement:
    """A node's place in one start of the run: its ranks are `first_rank` and those that follow."""

    node: Node
    index: int
    first_rank: int
    ranks: int

    def device(self, local_rank: int) -> int:
        """Number of the device of the node's rank `local_rank`."""
        return local_rank if self.node.devices is None else self.node.devices[local_rank]


@dataclass(frozen=True)
class Layout:
    """Which node gets which ranks, in one start of the run."""

    placements: tuple[Placement, ...]

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return sum(placement.ranks for placement in self.placements)

    @property
    def nodes(self) -> list[Node]:
        """In the order of their ranks."""
        return [placement.node for placement in self.placements]

    def node_of(self, rank: int) -> Node:
        """The node that a rank runs on."""
        return next(p.node for p in self.placements if p.first_rank <= rank < p.first_rank + p.ranks)


def place(nodes: Sequence[Node], ranks: int | None = None) -> Layout:
    """Number the ranks through, node after node; `ranks` limits them: the last nodes get fewer, or none."""
    placements: list[Placement] = []
    first = 0
    left = sum(node.slots for node in nodes) if ranks is None else ranks
    for node in nodes:
        count = min(node.slots, left)
        if count:
            placements.append(Placement(node, len(placements), first, count))
        first, left = first + count, left - count
    return Layout(tuple(placements))
