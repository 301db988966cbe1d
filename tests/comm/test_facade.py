"""The rest of `deepspeed.comm`: lists of tensors, messages, groups, and what the ledger says of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from xtrain import comm


def _lists() -> dict[str, Any]:
    rank, n = comm.get_rank(), comm.get_world_size()
    comm.ledger.reset()
    rows = [torch.full((2, 3), float(10 * rank + peer)) for peer in range(n)]
    reduced = torch.empty(2, 3)
    comm.reduce_scatter(reduced, rows)
    exchanged = [torch.empty(2, 3) for _ in range(n)]
    comm.all_to_all(exchanged, rows)
    uneven = [torch.empty(peer + 1) for peer in range(n)]
    comm.all_to_all(uneven, [torch.full((rank + 1,), float(rank)) for _ in range(n)])
    gathered = [torch.empty(3) for _ in range(n)] if rank == 1 else None
    comm.gather(torch.full((3,), float(rank)), gathered, dst=1)
    scattered = torch.empty(3)
    comm.scatter(
        scattered, [torch.full((3,), float(peer)) for peer in range(n)] if rank == 1 else None, src=1
    )
    several = [torch.full((size,), float(rank + 1)) for size in (1, 5)]
    comm.all_reduce_coalesced(several)
    outputs = [torch.empty(n * size) for size in (1, 5)]
    comm.all_gather_coalesced(
        outputs, [torch.full((size,), float(rank)) for size in (1, 5)], async_op=True
    ).wait()
    other = torch.empty(n)
    comm.allgather_fn(other, torch.tensor([float(rank)]))
    part = torch.empty(1)
    comm.reduce_scatter_fn(part, torch.arange(float(n)))
    sent = {name: float(comm.ledger.sent_bytes(name)) for name in ("gather", "scatter", "all_to_all")}
    return {
        "reduced": reduced, "exchanged": torch.stack(exchanged)[:, 0, 0], "uneven": torch.cat(uneven),
        "gathered": None if gathered is None else torch.stack(gathered)[:, 0], "scattered": scattered,
        "several": torch.cat(several), "outputs": torch.cat(outputs), "other": other, "part": part, "sent": sent,
    }  # fmt: skip


@pytest.mark.parametrize("n", [2, 4])
def test_lists_of_tensors(ranks: Any, n: int) -> None:
    everyone = torch.arange(float(n))
    for rank, got in enumerate(ranks(n, _lists)):
        assert torch.equal(got["reduced"], torch.full((2, 3), sum(10.0 * r + rank for r in range(n))))
        assert torch.equal(got["exchanged"], 10 * everyone + rank)
        assert torch.equal(got["uneven"], torch.cat([torch.full((r + 1,), float(r)) for r in range(n)]))
        assert (got["gathered"] is None) == (rank != 1)
        if rank == 1:
            assert torch.equal(got["gathered"], everyone)
        assert torch.equal(got["scattered"], torch.full((3,), float(rank)))
        assert torch.equal(got["several"], torch.full((6,), n * (n + 1) / 2))
        assert torch.equal(got["outputs"], torch.cat([everyone, everyone.repeat_interleave(5)]))
        assert torch.equal(got["other"], everyone)
        assert got["part"].item() == n * rank
        assert got["sent"]["gather"] == (0 if rank == 1 else 12)
        assert got["sent"]["scatter"] == (12 * (n - 1) if rank == 1 else 0)
        assert got["sent"]["all_to_all"] == (n - 1) * (24 + 4 * (rank + 1))


def _messages() -> list[float]:
    rank, n = comm.get_rank(), comm.get_world_size()
    after, before = (rank + 1) % n, (rank - 1) % n
    first, second, third = torch.empty(1), torch.empty(1), torch.empty(1)
    mine = torch.tensor([float(rank)])
    works = [comm.irecv(first, before), comm.isend(mine, after)]
    for work in works:
        work.wait()
    ops = [comm.P2POp(comm.isend, mine, after), comm.P2POp(comm.irecv, second, before)]
    for work in comm.batch_isend_irecv(ops):
        work.wait()
    theirs = [dist.P2POp(dist.isend, mine, after), dist.P2POp(dist.irecv, third, before)]
    for work in comm.batch_isend_irecv(theirs):  # type: ignore[arg-type]
        work.wait()
    comm.monitored_barrier()
    return [first.item(), second.item(), third.item()]


def test_messages(ranks: Any) -> None:
    for rank, got in enumerate(ranks(4, _messages)):
        assert got == [(rank - 1) % 4] * 3


def _groups() -> tuple[list[int], list[int], float]:
    mesh = comm.initialize_mesh_device((2, 2), ("data", "model"))
    group = mesh.get_group("model")
    value = torch.tensor([float(comm.get_rank())])
    comm.all_reduce(value, group=group)
    return comm.get_all_ranks_from_group(), comm.get_all_ranks_from_group(group), value.item()


def test_groups_and_meshes(ranks: Any) -> None:
    for rank, (world, members, total) in enumerate(ranks(4, _groups)):
        assert world == [0, 1, 2, 3]
        assert members == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert total == sum(members)
