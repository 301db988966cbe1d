"""The facade's collectives against their definitions, and the ledger against formulas."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xtrain import comm
from xtrain.errors import BackendError, ConfigError, NotImplementedYetError


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


def test_other_launchers_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(NotImplementedYetError, match="srun"):
        comm.init_distributed()


def test_an_unknown_library_is_an_error_with_rank_and_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_PORT", "29999")
    with pytest.raises(BackendError, match=r"rank 0 of 1 could not start nonsense at 127.0.0.1:29999"):
        comm.init_distributed("nonsense")
