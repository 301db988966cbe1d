"""Checks of the MPI process group: barriers, groups, the store, mistakes and time-outs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.mpi_tools import Check, Kind, listed_in, same, values
from xtrain import comm
from xtrain.base.errors import BackendError

CHECKS: dict[str, Check] = {}
check = listed_in(CHECKS)


@check
def barriers(rank: int, n: int) -> None:
    dist.barrier()
    if rank == 0:
        time.sleep(0.2)
    begun = time.monotonic()
    dist.barrier()
    assert rank == 0 or time.monotonic() - begun > 0.1
    dist.barrier(async_op=True).wait()
    dist.group.WORLD.monitored_barrier(timedelta(seconds=10))


@check
def sub_groups(rank: int, n: int) -> None:
    ends = dist.new_group([n - 1, 0])
    if rank in (0, n - 1):
        one = torch.tensor([float(rank)])
        dist.all_reduce(one, group=ends)
        assert one.item() == n - 1
        assert dist.get_process_group_ranks(ends) == [0, n - 1]
        dist.broadcast(one, n - 1, group=ends)
    else:
        assert ends == dist.GroupMember.NON_GROUP_MEMBER
    # only the members call: others do something else meanwhile
    if rank < 2:
        pair = dist.new_group([0, 1], use_local_synchronization=True)
        objects: list[Any] = [None, None]
        dist.all_gather_object(objects, rank, group=pair)
        assert objects == [0, 1]
        box = torch.full((2,), float(rank))
        dist.send(box, 1, group=pair) if rank == 0 else dist.recv(box, 0, group=pair)
        assert box.eq(0).all()
    whole = comm.companion(None)
    dist.barrier(whole)
    mesh = dist.init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("a", "b"))
    line = torch.tensor([float(rank)])
    dist.all_reduce(line, group=mesh.get_group("b"))
    assert line.item() == 2 * (rank // 2 * 2) + 1
    # more groups than MPI has communicators: ends are really given back
    for _ in range(20):
        group = dist.new_group(list(range(n)))
        dist.barrier(group)
        dist.destroy_process_group(group)


@check
def many_operations_in_many_groups(rank: int, n: int) -> None:
    """Three hundred random calls, up to ten in flight, over overlapping groups; waited for in random order."""
    draw, own = random.Random(7), random.Random(rank)  # the same on every rank, and not
    whole = list(range(n))
    members = [whole, [0, n - 1], [0, 1], whole]
    groups = [None, *(dist.new_group(ranks) for ranks in members[1:])]
    waiting: list[tuple[Any, torch.Tensor, torch.Tensor]] = []
    for number in range(300):
        which, size = draw.randrange(len(groups)), draw.choice([1, 7, 1000, 70000])
        dtype = draw.choice([torch.float64, torch.bfloat16, torch.int32])
        kind, picks, root = (
            draw.choice(["sum", "gather", "broadcast"]),
            draw.random(),
            draw.choice(members[which]),
        )
        ranks, group = members[which], groups[which]
        if rank in ranks:
            mine = [torch.full((size,), float(r + number % 5), dtype=dtype) for r in range(n)]
            if kind == "sum":
                found, right = mine[rank].clone(), sum(mine[r] for r in ranks)
                work = dist.all_reduce(found, group=group, async_op=True)
            elif kind == "gather":
                found, right = (
                    torch.empty(len(ranks) * size, dtype=dtype),
                    torch.cat([mine[r] for r in ranks]),
                )
                work = dist.all_gather(list(found.chunk(len(ranks))), mine[rank], group=group, async_op=True)
            else:
                found, right = mine[rank].clone(), mine[root]
                work = dist.broadcast(found, root, group=group, async_op=True)
            waiting.append((work, found, right))
        while len(waiting) > 10 * picks:
            work, found, right = waiting.pop(own.randrange(len(waiting)))
            work.wait()
            same(found, right)
    for work, found, right in waiting:
        work.wait()
        same(found, right)


@check
def gloo_group_beside_it(rank: int, n: int) -> None:
    """Another library's group finds its ranks through the store over MPI."""
    group = dist.new_group(list(range(n)), backend="gloo")
    mine = values(rank)
    dist.all_reduce(mine, group=group)
    torch.testing.assert_close(mine, sum(values(r) for r in range(n)))


@check
def store_between_ranks(rank: int, n: int) -> None:
    store = dist.distributed_c10d._get_default_store()
    if rank == n - 1:
        time.sleep(0.1)
        store.set("who", f"rank {rank}")
    assert store.get("who") == f"rank {n - 1}".encode()
    store.add("count", 1)
    dist.barrier()
    assert store.add("count", 0) == n
    assert store.check(["who"])
    assert not store.check(["nobody"])
    won = store.compare_set("first", "", str(rank))
    everyone: list[Any] = [None] * n
    dist.all_gather_object(everyone, won)
    assert set(everyone) == {store.get("first")}
    begun = time.monotonic()
    try:
        store.wait(["nobody"], timedelta(seconds=0.3))
    except (dist.DistStoreError, RuntimeError):
        assert 0.2 < time.monotonic() - begun < 5
    else:
        raise AssertionError("waiting for a key that nobody sets ended well")
    dist.barrier()
    if rank == n - 1:
        assert store.delete_key("who")
        assert not store.delete_key("who")
    dist.distributed_c10d._store_based_barrier(rank, store, "check", n, timedelta(seconds=20))


@check
def mistakes_are_sentences(rank: int, n: int) -> None:
    def says(words: list[str], call: Callable[[], Any]) -> None:
        with pytest.raises(BackendError) as caught:
            call()
        missing = [word for word in words if word not in str(caught.value)]
        assert not missing, f"{missing} not in {caught.value}"

    says(["BAND", "float32", "all_reduce"], lambda: dist.all_reduce(torch.ones(2), op=Kind.BAND))
    says(["bool", "AVG"], lambda: dist.all_reduce(torch.ones(2).bool(), op=Kind.AVG))
    says(["meta", "host memory"], lambda: dist.all_reduce(torch.ones(2, device="meta")))
    group = dist.group.WORLD
    says(
        ["rows", "all_to_all"],
        lambda: group.all_to_all_single(torch.ones(n), torch.ones(n), [1] * n, [2] * n),
    )
    says(["does not fit"], lambda: group.all_gather_single(torch.ones(3 * n), torch.ones(2)))
    # a message longer than the place for it: MPI itself notices
    alone = dist.new_group([0, n - 1])
    if rank == 0:
        dist.send(torch.ones(8), n - 1, group=alone)
    elif rank == n - 1:
        says(["recv from rank 0", "float32[4]"], lambda: dist.recv(torch.ones(4), 0, group=alone))
        says(["unusable"], lambda: dist.barrier(alone))
    dist.barrier()


@check
def a_wait_that_takes_too_long(rank: int, n: int) -> None:
    """Last: it leaves a group unusable. The others join in late, so that MPI can still end in order."""
    store = dist.distributed_c10d._get_default_store()
    slow = dist.new_group(list(range(n)), timeout=timedelta(seconds=0.5))
    watched = dist.new_group(list(range(n)), timeout=timedelta(seconds=0.5))
    if rank == 0:
        for group in (slow, watched):
            work = dist.all_reduce(torch.ones(3), group=group, async_op=True)
            begun = time.monotonic()
            with pytest.raises((BackendError, RuntimeError)) as caught:
                work.wait() if group is slow else work.get_future().wait()
            assert 0.4 < time.monotonic() - begun < 5
            words = ("rank 0", "all_reduce", "float32[3]", "12 bytes", group.group_name, "0.5 s")
            assert all(word in str(caught.value) for word in words), caught.value
            assert isinstance(work.exception(), BackendError)
        with pytest.raises(BackendError, match="rank 1"):
            dist.group.WORLD.monitored_barrier(timedelta(seconds=0.3))
        store.set("late", "now")
    else:
        store.get("late")
        for group in (slow, watched):
            dist.all_reduce(torch.ones(3), group=group, async_op=True).wait(timedelta(seconds=20))
