"""Which ranks are in which group, for grids of our own and for mpus of others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.parallel import ModelParallel, ProcessGrid, grid_from_mpu
from xtrain.parallel.grid import counted_once
from xtrain.utils import groups
from xtrain.zero.holdings import counted_parts
from xtrain.zero.layout import cut

_KINDS = (
    "data_parallel", "model_parallel", "tensor_model_parallel", "pipeline_model_parallel", "sequence_parallel",
    "sequence_data_parallel",
)  # fmt: skip


def _groups(sizes: dict[str, int]) -> Any:
    grid = ProcessGrid(**sizes)
    found = {}
    for kind in _KINDS:
        group = getattr(grid, f"get_{kind}_group")()
        found[kind] = dist.get_process_group_ranks(group)
        assert getattr(grid, f"get_{kind}_world_size")() == len(found[kind])
        assert found[kind][getattr(grid, f"get_{kind}_rank")()] == dist.get_rank()
    assert grid.get_tensor_model_parallel_src_rank() == found["tensor_model_parallel"][0]
    assert grid.get_data_parallel_src_rank() == found["data_parallel"][0]
    read = grid_from_mpu(grid)
    assert (read.model.tensor, read.model.pipeline, read.sequence, read.replicas) == tuple(
        len(found[kind]) for kind in _KINDS[2:5] + _KINDS[:1]
    )
    groups.mpu = grid
    assert groups.get_model_parallel_world_size() == len(found["model_parallel"])
    assert groups.get_tensor_model_parallel_rank() == grid.get_tensor_model_parallel_rank()
    assert groups._get_sequence_data_parallel_rank() == grid.get_sequence_data_parallel_rank()
    assert dist.get_process_group_ranks(groups.get_data_parallel_group()) == found["data_parallel"]
    groups.mpu = None
    return found, repr(grid), grid.mesh.mesh_dim_names


@pytest.mark.parametrize(("sizes", "rank_3"), [
    ({"tensor": 2}, ([1, 3], [2, 3], [2, 3], [3], [3], [1, 3])),
    ({"tensor": 2, "pipeline": 2}, ([3], [0, 1, 2, 3], [2, 3], [1, 3], [3], [3])),
    ({"sequence": 2, "tensor": 2}, ([3], [2, 3], [2, 3], [3], [1, 3], [1, 3])),
    ({"pipeline": 2, "sequence": 2}, ([3], [1, 3], [3], [1, 3], [2, 3], [2, 3])),
    ({"data": 2, "sequence": 2}, ([1, 3], [3], [3], [3], [2, 3], [0, 1, 2, 3])),
])  # fmt: skip
def test_groups(ranks: Any, sizes: dict[str, int], rank_3: tuple[list[int], ...]) -> None:
    found, shown, names = ranks(4, _groups, sizes)[3]
    assert tuple(found[kind] for kind in _KINDS) == rank_3
    assert all(f"{name}={size}" in shown for name, size in sizes.items())
    assert names == ("pipeline", "data", "sequence", "tensor")


def _mistakes() -> None:
    for sizes, said in (
        ({"tensor": 3}, "tensor 3 does not divide 2 ranks"),
        ({"tensor": 2, "data": 2}, "data 2 x sequence 1 x tensor 2 does not divide 2 ranks"),
        ({"pipeline": 0}, r"ProcessGrid\(pipeline=0\) must be a whole number"),
        ({"sequence": 1.5}, r"ProcessGrid\(sequence=1.5\) must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=said):
            ProcessGrid(**sizes)
    world = dist.group.WORLD
    data = {
        "get_data_parallel_group": lambda: world,
        "get_data_parallel_world_size": lambda: 2,
        "get_data_parallel_rank": dist.get_rank,
    }
    assert grid_from_mpu(SimpleNamespace(**data)).size == 2  # no model-parallel names: none such
    for changed, said in (
        (
            {"get_data_parallel_rank": None},
            r"no method get_data_parallel_rank\(\): .* the data-parallel ranks",
        ),
        (
            {"get_data_parallel_world_size": lambda: 4},
            "the data-parallel group has 4 ranks, but its group has 2",
        ),
        (
            {"get_model_parallel_world_size": lambda: 2},
            r"no method get_model_parallel_group\(\)|tensor_model",
        ),
        (
            {"get_model_parallel_world_size": lambda: 4, "get_model_parallel_group": lambda: world},
            "the model-parallel group .* has 4 ranks, but its group has 2",
        ),
        (
            {
                "get_model_parallel_world_size": lambda: 2,
                "get_model_parallel_group": lambda: world,
                "get_model_parallel_rank": dist.get_rank,
            },
            "data 2 x sequence 1 x tensor 2 x pipeline 1, which does not divide the 2 ranks",
        ),
        (
            {"get_pipeline_model_parallel_world_size": lambda: 2, "get_model_parallel_world_size": lambda: 2},
            r"no method get_tensor_model_parallel_world_size\(\) or get_slice_parallel_world_size\(\)",
        ),
        (
            {"get_sequence_parallel_world_size": lambda: 2},
            r"no method get_sequence_data_parallel_group\(\): .* hold the same parameters",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            grid_from_mpu(SimpleNamespace(**{**data, **changed}))
    with pytest.raises(NotImplementedYetError, match="context parallelism"):
        grid_from_mpu(SimpleNamespace(**data, get_context_parallel_world_size=lambda: 2))


def test_mistakes_are_told_in_one_sentence(ranks: Any) -> None:
    ranks(2, _mistakes)


def _ulysses() -> Any:
    """DeepSpeed's own mpu for sequences knows no data-parallel ranks: neighbours share a sample."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mpu = SimpleNamespace(
        get_sequence_parallel_group=lambda: pairs[dist.get_rank() // 2],
        get_sequence_parallel_world_size=lambda: 2,
        get_sequence_data_parallel_group=lambda: dist.group.WORLD,
    )
    grid = grid_from_mpu(mpu)
    return grid.size, grid.rank, grid.sequence, grid.replicas, grid.replica


def test_an_mpu_of_sequences_alone(ranks: Any) -> None:
    assert ranks(4, _ulysses) == [(4, rank, 2, 2, rank // 2) for rank in range(4)]


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=12),
    partitions=st.integers(1, 5),
    bucket_size=st.integers(1, 60),
    align=st.sampled_from([1, 4]),
)
def test_every_element_counts_on_exactly_one_tensor_rank(
    sizes: list[tuple[int, bool]], partitions: int, bucket_size: int, align: int
) -> None:
    """Divided parameters differ and count on both ranks; replicated ones on the first; padding is anybody's."""
    layout = cut([size for size, _ in sizes], partitions, bucket_size, align)
    members = [SimpleNamespace(tensor_model_parallel=divided) for _, divided in sizes]
    owner: list[Any] = [None] * layout.total  # of each element of the flat buffer
    for start, (size, divided) in zip(layout.starts, sizes, strict=True):
        owner[start : start + size] = [divided] * size
    for tensor_rank in range(2):
        model = ModelParallel(tensor=2, tensor_rank=tensor_rank)
        for partition in range(partitions):
            group: Any = SimpleNamespace(
                layout=layout, members=members, partition=partition, by_parameter=False
            )
            parts = counted_parts(group, model)
            for bucket, found in zip(layout.buckets, parts, strict=True):
                low, high = layout.owned(bucket, partition)
                flags = [counts for start, stop, counts in found for _ in range(start, stop)]
                assert [start for start, _, _ in found[1:]] == [stop for _, stop, _ in found[:-1]]
                assert len(flags) == high - low
                for divided, counts in zip(owner[low:high], flags, strict=True):
                    assert counts == (divided is not False or tensor_rank == 0)


def test_which_rank_counts_a_parameter() -> None:
    divided, old, copied, tied = (SimpleNamespace() for _ in range(4))
    divided.tensor_model_parallel, old.model_parallel = True, True
    copied.tensor_model_parallel, tied.ds_pipe_replicated = False, True
    first, second = ModelParallel(tensor=2), ModelParallel(tensor=2, tensor_rank=1)
    assert [counted_once(param, first) for param in (divided, old, copied, tied)] == [True, True, True, False]  # type: ignore[arg-type]
    assert [counted_once(param, second) for param in (divided, old, copied, tied)] == [
        True,
        True,
        False,
        False,
    ]  # type: ignore[arg-type]
