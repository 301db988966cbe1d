"""Coordinates of ranks in a grid with named axes, as `deepspeed.runtime.pipe.topology` has them."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import Any

from xtrain.base.errors import ConfigError


class ProcessTopology:
    """A grid of ranks in row-major order: the last axis changes fastest.

    `ProcessTopology(["pipe", "data"], [2, 3]).get_rank(pipe=1, data=0)` is 3.

    Raises:
        ConfigError: the axes and their lengths do not fit, or a coordinate or rank is outside.
    """

    def __init__(self, axes: Sequence[str], dims: Sequence[int]) -> None:
        if len(axes) != len(dims) or any(length < 1 for length in dims):
            raise ConfigError(
                f"a topology needs one positive length for each of the axes {list(axes)}, got {list(dims)}"
            )
        self.axes, self.dims = list(axes), list(dims)
        self.ProcessCoord: Any = namedtuple("ProcessCoord", self.axes)  # type: ignore[misc]

    @property
    def mapping(self) -> dict[Any, int]:
        """The rank of each coordinate."""
        return {self.get_coord(rank): rank for rank in range(self.world_size())}

    def world_size(self) -> int:
        """Ranks in the grid."""
        return math.prod(self.dims)

    def get_axis_names(self) -> list[str]:
        """The axes, the slowest first."""
        return self.axes

    def get_dim(self, axis: str) -> int:
        """Length of an axis; 0 for one that is not there."""
        return self.dims[self.axes.index(axis)] if axis in self.axes else 0

    def get_rank(self, **coord_kwargs: int) -> int:
        """The rank at a coordinate, which names every axis."""
        if set(coord_kwargs) != set(self.axes):
            raise ConfigError(
                f"get_rank() needs each of the axes {self.axes} once: filter_match() takes fewer"
            )
        rank = 0
        for axis, length in zip(self.axes, self.dims, strict=True):
            if not 0 <= coord_kwargs[axis] < length:
                raise ConfigError(
                    f"{axis}={coord_kwargs[axis]} is outside of the topology, which has {length} there"
                )
            rank = rank * length + coord_kwargs[axis]
        return rank

    def get_coord(self, rank: int) -> Any:
        """The coordinate of a rank, a namedtuple of the axes."""
        if not 0 <= rank < self.world_size():
            raise ConfigError(f"rank {rank} is outside of the topology, which has {self.world_size()}")
        found = []
        for length in reversed(self.dims):
            rank, at = divmod(rank, length)
            found.append(at)
        return self.ProcessCoord(*reversed(found))

    def get_rank_repr(
        self,
        rank: int,
        omit_axes: Iterable[str] = ("data", "pipe"),
        inner_sep: str = "_",
        outer_sep: str = "-",
    ) -> str:
        """The coordinate as text for file names: `model_00`."""
        coord, omitted = self.get_coord(rank), set(omit_axes)
        shown = [f"{axis}{inner_sep}{getattr(coord, axis):02d}" for axis in self.axes if axis not in omitted]
        return outer_sep.join(shown)

    def filter_match(self, **filter_kwargs: int) -> list[int]:
        """The ranks whose coordinates have these values, in order."""
        wanted = filter_kwargs.items()
        coords = map(self.get_coord, range(self.world_size()))
        return [
            rank
            for rank, at in enumerate(coords)
            if all(getattr(at, axis) == value for axis, value in wanted)
        ]

    def get_axis_list(self, axis: str, idx: int) -> list[int]:
        """The ranks at a place of an axis."""
        return self.filter_match(**{axis: idx})

    def get_axis_comm_lists(self, axis: str) -> list[list[int]]:
        """Groups of ranks that differ in this axis only; none for an axis that is not there."""
        if axis not in self.axes:
            return []
        first = self.get_axis_list(axis, 0)
        others = [self.get_coord(rank)._asdict() for rank in first]
        return [
            [self.get_rank(**{**at, axis: place}) for place in range(self.get_dim(axis))] for at in others
        ]

    def __str__(self) -> str:
        return str(self.mapping)


class PipeDataParallelTopology(ProcessTopology):
    """Pipeline stages of data-parallel ranks."""

    def __init__(self, num_pp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data"], [num_pp, num_dp])


class PipeModelDataParallelTopology(ProcessTopology):
    """Pipeline stages, data-parallel ranks in them, tensor-parallel ranks next to each other."""

    def __init__(self, num_pp: int, num_mp: int, num_dp: int) -> None:
        super().__init__(["pipe", "data", "model"], [num_pp, num_dp, num_mp])
