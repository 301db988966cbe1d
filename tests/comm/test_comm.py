"""The facade's collectives against their definitions, and the ledger against formulas."""

from __future__ import annotations

from datetime import timedelta
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import xtrain
from tests import training
from xtrain import comm
from xtrain.base.errors import BackendError, ConfigError


def _collectives() -> dict[str, Any]:
    rank, n = comm.get_rank(), comm.get_world_size()
    mine = torch.arange(2.0 * n) + 10 * rank
    total = mine.clone()
    comm.all_reduce(total)
    largest = torch.tensor([float(rank)])
    comm.all_reduce(largest, op=comm.ReduceOp.MAX)
    part = torch.empty(2)
    comm.reduce_scatter_tensor(part, mine.clone())
    gathered = torch.empty(2 * n)
    comm.all_gather_into_tensor(gathered, part)
    exchanged = torch.empty(2 * n)
    comm.all_to_all_single(exchanged, mine)
    from_one = mine.clone()
    comm.broadcast(from_one, 1)
    to_zero = mine.clone()
    comm.reduce(to_zero, 0)
    each = [torch.empty(2 * n) for _ in range(n)]
    comm.all_gather(each, mine)
    if rank == 0:
        comm.send(mine, 1)
    received = torch.zeros(2 * n)
    if rank == 1:
        assert comm.recv(received, 0) == 0
    objects: list[Any] = [None] * n
    comm.all_gather_object(objects, {"rank": rank})
    shared = [rank, "x"] if rank == 1 else [None, None]
    comm.broadcast_object_list(shared, 1)
    comm.barrier()
    return {
        "total": total, "largest": largest, "part": part, "gathered": gathered, "exchanged": exchanged,
        "from_one": from_one, "to_zero": to_zero, "each": torch.cat(each), "received": received,
        "objects": objects, "shared": shared,
        "ledger": {key: (e.calls, e.message_bytes, e.sent_bytes) for key, e in comm.ledger.entries.items()},
    }  # fmt: skip


@pytest.mark.parametrize("n", [2, 4])
def test_collectives_do_what_they_say(ranks: Any, n: int) -> None:
    rows = [torch.arange(2.0 * n) + 10 * rank for rank in range(n)]
    total = torch.stack(rows).sum(0)
    for rank, got in enumerate(ranks(n, _collectives)):
        assert torch.equal(got["total"], total)
        assert got["largest"].item() == n - 1
        assert torch.equal(got["part"], total[2 * rank : 2 * rank + 2])
        assert torch.equal(got["gathered"], total)
        assert torch.equal(got["exchanged"], torch.cat([row[2 * rank : 2 * rank + 2] for row in rows]))
        assert torch.equal(got["from_one"], rows[1])
        assert torch.equal(got["each"], torch.cat(rows))
        assert got["objects"] == [{"rank": r} for r in range(n)]
        assert got["shared"] == [1, "x"]
        if rank == 0:
            assert torch.equal(got["to_zero"], total)
        if rank == 1:
            assert torch.equal(got["received"], rows[0])
        size = 2 * n * 4
        ledger = got["ledger"]
        assert ledger["all_reduce", "world"] == (2, size + 4, Fraction((size + 4) * 2 * (n - 1), n))
        assert ledger["reduce_scatter", "world"] == (1, size, Fraction(size * (n - 1), n))
        assert ledger["all_to_all", "world"] == (1, size, Fraction(size * (n - 1), n))
        assert ledger["barrier", "world"] == (1, 0, 0)
        assert ledger.get(("send", "world"), (0, 0, 0))[2] == (size if rank == 0 else 0)


def _groups() -> tuple[float, list[tuple[str, str]], str]:
    evens, odds = comm.new_group([0, 2]), comm.new_group([1, 3])
    mine = evens if comm.get_rank() % 2 == 0 else odds
    value = torch.tensor([float(comm.get_rank())])
    comm.all_reduce(value, group=mine)
    assert comm.get_world_size(mine) == 2
    assert comm.get_global_rank(mine, 1) == comm.get_rank() % 2 + 2
    return value.item(), list(comm.ledger.entries), comm.ledger.summary()


def test_subgroups_are_counted_apart(ranks: Any) -> None:
    results = ranks(4, _groups)
    assert [value for value, _, _ in results] == [2.0, 4.0, 2.0, 4.0]
    operations = results[0][1]
    assert operations[0][0] == "all_reduce"
    assert operations[0][1] != "world"
    assert "all_reduce" in results[0][2]


@given(st.integers(1, 64), st.integers(0, 10**9))
def test_an_all_reduce_costs_a_reduce_scatter_and_an_all_gather(n: int, size: int) -> None:
    ledger = comm.Ledger()
    ledger.record("all_reduce", "a", n, size)
    ledger.record("reduce_scatter", "b", n, size)
    ledger.record("all_gather", "b", n, size)
    assert ledger.sent_bytes("all_reduce") == ledger.sent_bytes("reduce_scatter", "all_gather")
    ledger.reset()
    assert ledger.sent_bytes() == 0


def test_without_a_group_there_is_one_rank() -> None:
    assert (comm.get_rank(), comm.get_world_size(), comm.is_initialized()) == (0, 1, False)


def test_a_missing_group_is_said() -> None:
    with pytest.raises(ConfigError, match="dist_init_required=False"):
        comm.init_distributed(dist_init_required=False)


def test_an_unknown_library_is_an_error() -> None:
    with pytest.raises(BackendError, match="unknown process-group library 'nonsense': choose one of "):
        comm.init_distributed("nonsense")


def test_ranks_that_never_come_are_an_error_with_rank_and_address(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29999",
    }
    for name, value in place.items():  # all of them, so that none stays set after the test
        monkeypatch.setenv(name, value)
    with pytest.raises(BackendError, match=r"backend gloo, rank 0 of 2: nothing came from rank 1 within "):
        comm.init_distributed("gloo", timeout=timedelta(seconds=1))


def _slices(dtype: torch.dtype, elements: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    n, rank = comm.get_world_size(), comm.get_rank()
    values = torch.randn(n, n, elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    comm.ledger.reset()
    total = comm.SliceSum(values[rank].flatten().clone(), None).wait().clone()
    whole = torch.zeros(n * elements, dtype=dtype)
    comm.SliceGather(whole, values[rank, 0].clone(), None).wait()
    in_place = torch.zeros(n * elements, dtype=dtype)
    in_place[rank * elements :][:elements] = values[rank, 0]
    comm.SliceGather(in_place, in_place[rank * elements :][:elements], None).wait()
    assert torch.equal(whole, values[:, 0].flatten())
    assert torch.equal(in_place, whole)
    return total, values[:, rank].double().sum(0), float(comm.ledger.sent_bytes())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [0, 1, 1000])
def test_sums_and_gathers_of_slices(ranks: Any, dtype: torch.dtype, elements: int) -> None:
    for n in (1, 2, 3, 4):
        for total, expected, sent in ranks(n, _slices, dtype, elements):
            tolerance = 1e-6 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)
            assert sent == 3 * (n - 1) * elements * dtype.itemsize


class _Counted:
    """Counts what torch.distributed's functions are given to send, below the facade."""

    def __init__(self) -> None:
        self.sent = 0.0
        n = dist.get_world_size()
        self._factors = {"isend": 1.0, "all_reduce": 2 * (n - 1) / n}
        others = ("send", "broadcast", "all_to_all_single", "all_gather_into_tensor", "reduce_scatter_tensor")
        self._originals = {name: getattr(dist, name) for name in (*self._factors, *others)}

    def __enter__(self) -> _Counted:
        for name, original in self._originals.items():

            def counted(
                tensor: Any, *args: Any, name: str = name, original: Any = original, **more: Any
            ) -> Any:
                assert name in self._factors, f"{name} is not expected in a step"
                self.sent += self._factors[name] * tensor.nbytes
                return original(tensor, *args, **more)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


def _counted_step(stage: int) -> tuple[float, float, int]:
    settings = training.config(stage, 8, zero_optimization=training.zero(stage, 0))
    model = training.build_model()
    engine, _, _, _ = xtrain.initialize(model=model, model_parameters=model.parameters(), config=settings)
    training.engine_step(engine, 0)
    comm.ledger.reset()
    with _Counted() as counted:
        training.engine_step(engine, 1)
    sent, numbers = float(comm.ledger.sent_bytes()), float(comm.ledger.sent_bytes("roll_call"))
    assert (numbers > 0) == (stage == 3)  # what each rank gathers, in eight bytes a gather
    elements = sum(group.layout.total for group in engine.optimizer.groups)
    return counted.sent - numbers, sent - numbers, elements


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_ledger_against_a_count_below_it(ranks: Any, stage: int) -> None:
    for sent, ledger, elements in ranks(2, _counted_step, stage):
        assert sent == ledger
        small = 8 if stage == 0 else 16  # the test's loss and the norm, one float64 each
        assert sent - small == (3 if stage == 3 else 2) * elements * 4 / 2
