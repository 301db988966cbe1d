"""Coordinates of ranks, against numpy's arithmetic of row-major indices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError
from xtrain.runtime.pipe.topology import PipeModelDataParallelTopology, ProcessTopology

AXES = ["pipe", "data", "model", "other"]
DIMS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(DIMS)
def test_ranks_are_row_major_indices(dims: list[int]) -> None:
    grid = ProcessTopology(AXES[: len(dims)], dims)
    assert grid.world_size() == len(grid.mapping) == np.prod(dims)
    for rank in range(grid.world_size()):
        place = tuple(map(int, np.unravel_index(rank, dims)))
        assert tuple(grid.get_coord(rank)) == place
        assert grid.get_rank(**dict(zip(AXES, place, strict=False))) == rank


@given(DIMS)
def test_groups_along_an_axis_divide_the_ranks(dims: list[int]) -> None:
    grid, numbers = ProcessTopology(AXES[: len(dims)], dims), np.arange(np.prod(dims)).reshape(dims)
    for at, axis in enumerate(grid.get_axis_names()):
        expected = np.moveaxis(numbers, at, -1).reshape(-1, dims[at]).tolist()
        assert sorted(grid.get_axis_comm_lists(axis)) == sorted(expected)
        assert grid.get_axis_list(axis, 0) == np.take(numbers, 0, at).flatten().tolist()


def test_names_and_mistakes() -> None:
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=3)
    assert grid.get_rank_repr(5) == "model_01"
    assert grid.get_rank_repr(11, omit_axes=(), inner_sep="", outer_sep="/") == "pipe01/data02/model01"
    assert (grid.get_dim("data"), grid.get_dim("expert"), grid.get_axis_comm_lists("expert")) == (3, 0, [])
    assert grid.filter_match(pipe=1, model=0) == [6, 8, 10]
    for wrong in (
        lambda: grid.get_rank(pipe=0),
        lambda: grid.get_rank(pipe=0, data=3, model=0),
        lambda: grid.get_coord(12),
    ):
        with pytest.raises(ConfigError, match=r"filter_match|data=3 is outside|rank 12 is outside"):
            wrong()
    with pytest.raises(ConfigError, match="one positive length"):
        ProcessTopology(["a", "b"], [2])
