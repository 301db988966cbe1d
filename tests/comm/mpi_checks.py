"""Checks of the MPI process group, run by every rank under mpiexec; tests/comm/test_mpi.py starts them.

    mpiexec -n 2 python -m tests.comm.mpi_checks FOLDER     writes FOLDER/<rank>.json: check -> "" or a traceback

Expected values are computed on the spot from every rank's inputs, without communication.
"""

from __future__ import annotations

import json
import random
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests import training
from xtrain import comm
from xtrain.errors import BackendError

CHECKS: dict[str, Callable[[int, int], Any]] = {}
Kind = dist.ReduceOp

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex64, torch.complex128]


def check(function: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    CHECKS[function.__name__] = function
    return function


def values(
    rank: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 5), seed: int = 0
) -> Any:
    """The inputs of a rank: any rank can compute any other's."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype in INTEGERS:
        return torch.randint(1, 4, shape, generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.complex(
            *(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "ri")
        ).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same(found: torch.Tensor, expected: torch.Tensor, exact: bool = True) -> None:
    if exact:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(found, expected)


def reduced(inputs: list[torch.Tensor], op: Any) -> torch.Tensor:
    """What a reduction means: in fp32 and one rounding where the dtype is narrower."""
    dtype = inputs[0].dtype
    narrow = dtype in (torch.float16, torch.bfloat16)
    stack = torch.stack([tensor.float() if narrow else tensor for tensor in inputs])
    n = len(inputs)
    if dtype == torch.bool:
        odd = stack.sum(0) % 2 == 1
        some = {Kind.SUM, Kind.MAX, Kind.BOR}
        return stack.any(0) if op in some else odd if op == Kind.BXOR else stack.all(0)
    total = stack[0].clone()
    for row in stack[1:]:
        if op in (Kind.SUM, Kind.AVG):
            total = total + row
        elif op == Kind.PRODUCT:
            total = total * row
        elif op == Kind.MIN:
            total = torch.minimum(total, row)
        elif op == Kind.MAX:
            total = torch.maximum(total, row)
        else:
            total = {
                Kind.BAND: torch.bitwise_and,
                Kind.BOR: torch.bitwise_or,
                Kind.BXOR: torch.bitwise_xor,
            }[op](total, row)
    if op == Kind.AVG:
        whole = dtype in INTEGERS
        total = torch.div(total, n, rounding_mode="trunc" if whole else None)
    return total.to(dtype)


@check
def all_reduce_every_dtype_and_operation(rank: int, n: int) -> None:
    for dtype in FLOATS + INTEGERS + COMPLEX + [torch.bool]:
        ops = [Kind.SUM]
        if dtype != torch.bool:
            ops.append(Kind.AVG)
        if not dtype.is_complex:
            ops += [Kind.PRODUCT, Kind.MIN, Kind.MAX]
        if not (dtype.is_complex or dtype.is_floating_point):
            ops += [Kind.BAND, Kind.BOR, Kind.BXOR]
        for op in ops:
            mine = values(rank, dtype)
            dist.all_reduce(mine, op=op)
            expected = reduced([values(r, dtype) for r in range(n)], op)
            # Two terms have one sum; more of them may be added in another order.
            assert_near = n > 2 and (dtype.is_floating_point or dtype.is_complex)
            try:
                same(mine, expected, exact=not assert_near)
            except AssertionError as error:
                raise AssertionError(f"{dtype} {op}: {error}") from None


@check
def narrow_floats_are_rounded_once(rank: int, n: int) -> None:
    # 256 + 1 + 1 ...: in bf16 every single addition of 1 would be lost, the whole of them is not.
    mine = torch.tensor([256.0 if rank == 0 else 1.5], dtype=torch.bfloat16)
    dist.all_reduce(mine)
    same(mine, torch.tensor([256.0 + 1.5 * (n - 1)]).bfloat16())
    # each partial sum beyond 65504 would be infinite in fp16
    big = torch.tensor([60000.0 if rank == 0 else 40000.0 if rank == 1 else -20000.0], dtype=torch.float16)
    dist.all_reduce(big, op=Kind.AVG)
    same(big, torch.tensor([(60000.0 + 40000.0 - 20000.0 * (n - 2)) / n]).half())


@check
def scaled_sums_and_other_layouts(rank: int, n: int) -> None:
    op = dist._make_nccl_premul_sum(0.25)
    mine = values(rank)
    dist.all_reduce(mine, op=op)
    same(mine, sum(values(r) * 0.25 for r in range(n)), exact=n == 2)
    whole = values(rank, shape=(6, 8))
    before = whole.clone()
    dist.all_reduce(whole.t()[2:5], op=Kind.AVG)  # a transposed slice: not contiguous
    expected = before.clone()
    expected[:, 2:5] = reduced([values(r, shape=(6, 8))[:, 2:5] for r in range(n)], Kind.AVG)
    same(whole, expected, exact=n == 2)
    number = values(rank, torch.complex64)
    turned = number.conj()  # a view whose memory holds the other sign
    each = [torch.empty(6, 5, dtype=torch.complex64).conj() for _ in range(n)]
    dist.group.WORLD.allgather([each], [turned]).wait()
    for r in range(n):
        same(each[r].resolve_conj(), values(r, torch.complex64).conj().resolve_conj())
    dist.group.WORLD.allreduce([turned]).wait()
    same(number, reduced([values(r, torch.complex64) for r in range(n)], Kind.SUM), exact=n == 2)
    nothing = torch.empty(0)
    dist.all_reduce(nothing)
    one = torch.tensor(float(rank))
    dist.all_reduce(one)
    assert one.item() == n * (n - 1) / 2
    parameter = nn.Parameter(values(rank))
    dist.all_reduce(parameter)
    same(parameter.detach(), sum(values(r) for r in range(n)), exact=n == 2)


@check
def contiguous_memory_is_not_copied(rank: int, n: int) -> None:
    """MPI is handed the tensor's own memory: contents that arrive are there before anything is copied."""
    from xtrain.comm.mpi.buffers import Transfer, spec

    tensor = values(rank)
    transfer = Transfer("probe")
    assert transfer.writing(tensor).data_ptr() == transfer.reading(tensor).data_ptr() == tensor.data_ptr()
    assert spec(tensor)[0].address == tensor.data_ptr()
    pieces = list(tensor.chunk(3))
    assert transfer.writing_list(pieces).data_ptr() == tensor.data_ptr()
    assert transfer.reading_list(pieces).data_ptr() == tensor.data_ptr()
    assert transfer.reading_list([pieces[1], pieces[0]]).data_ptr() != tensor.data_ptr()
    assert not transfer.after


@check
def coalesced(rank: int, n: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensors = [values(rank, dtype, shape=(seed + 1, 3), seed=seed) for seed in range(3)]
        dist.all_reduce_coalesced(tensors, async_op=True).wait()
        for seed, tensor in enumerate(tensors):
            rows = [values(r, dtype, shape=(seed + 1, 3), seed=seed) for r in range(n)]
            same(tensor, reduced(rows, Kind.SUM), exact=n == 2 or dtype == torch.int64)
    outputs = [torch.empty(n * 4), torch.empty(n * 3, dtype=torch.float64)]
    inputs = [values(rank, shape=(4,)), values(rank, torch.float64, shape=(3,))]
    with dist._coalescing_manager():
        for output, given in zip(outputs, inputs, strict=True):
            comm.all_gather_into_tensor(output, given)
    same(outputs[0], torch.cat([values(r, shape=(4,)) for r in range(n)]))
    same(outputs[1], torch.cat([values(r, torch.float64, shape=(3,)) for r in range(n)]))
    parts = [torch.empty(4), torch.empty(3, dtype=torch.float64)]
    wholes = [values(rank, shape=(4 * n,)), values(rank, torch.float64, shape=(3 * n,))]
    with dist._coalescing_manager(async_ops=True) as manager:
        for part, whole in zip(parts, wholes, strict=True):
            comm.reduce_scatter_tensor(part, whole)
    manager.wait()
    for part in parts:
        rows = [values(r, part.dtype, shape=(part.numel() * n,)) for r in range(n)]
        same(part, reduced(rows, Kind.SUM).chunk(n)[rank], exact=n == 2)
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        first, second = values(rank), values(rank)
        dist.broadcast(first, 0)
        dist.broadcast(second, n - 1)
    manager.wait()
    same(first, values(0))
    same(second, values(n - 1))


@check
def reduce_scatter(rank: int, n: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for op in (Kind.SUM, Kind.AVG, Kind.MAX):
            rows = [values(r, dtype, shape=(3 * n, 4)) for r in range(n)]
            expected = reduced(rows, op).chunk(n)[rank]
            exact = n == 2 or op == Kind.MAX or dtype == torch.int32
            out = torch.empty(3, 4, dtype=dtype)
            comm.reduce_scatter_tensor(out, rows[rank].clone(), op=op)
            same(out, expected, exact)
            out = torch.empty(4, 3, dtype=dtype).t()
            dist.reduce_scatter(out, list(rows[rank].chunk(n)), op=op)
            same(out, expected, exact)
            # the output is a piece of the input
            whole = rows[rank].clone()
            comm.reduce_scatter_tensor(whole.chunk(n)[rank], whole, op=op)
            same(whole.chunk(n)[rank], expected, exact)
    uneven = [values(rank, shape=(r + 1,), seed=r) for r in range(n)]
    out = torch.empty(rank + 1)
    dist.reduce_scatter(out, uneven)
    same(out, reduced([values(r, shape=(rank + 1,), seed=rank) for r in range(n)], Kind.SUM), n == 2)


@check
def all_gather(rank: int, n: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex128, torch.int8):
        expected = torch.stack([values(r, dtype) for r in range(n)])
        out = torch.empty(n, 6, 5, dtype=dtype)
        comm.all_gather_into_tensor(out, values(rank, dtype))
        same(out, expected)
        out = torch.empty(n, 6, 5, dtype=dtype)
        out[rank] = values(rank, dtype)
        comm.all_gather_into_tensor(out, out[rank])  # in place
        same(out, expected)
        each = [torch.empty(5, 6, dtype=dtype).t() for _ in range(n)]
        dist.all_gather(each, values(rank, dtype))
        same(torch.stack(each), expected)
        chunks = list(torch.empty(n, 6, 5, dtype=dtype).unbind(0))
        dist.all_gather(chunks, values(rank, dtype).t().contiguous().t())
        same(torch.stack(chunks), expected)
    uneven = [torch.empty(r + 1) for r in range(n)]
    dist.all_gather(uneven, values(rank, shape=(rank + 1,)))
    for r in range(n):
        same(uneven[r], values(r, shape=(r + 1,)))


@check
def all_to_all(rank: int, n: int) -> None:
    rows = [values(r, shape=(2 * n, 3)) for r in range(n)]
    out = torch.empty(2 * n, 3)
    dist.all_to_all_single(out, rows[rank])
    same(out, torch.cat([row.chunk(n)[rank] for row in rows]))
    # rank s sends (s + d) % 3 rows to rank d: pieces of zero rows are among them
    split = [[(s + d) % 3 for d in range(n)] for s in range(n)]
    given = [values(s, torch.bfloat16, shape=(sum(split[s]), 4)) for s in range(n)]
    received = [split[s][rank] for s in range(n)]
    out = torch.empty(sum(received), 4, dtype=torch.bfloat16)
    dist.all_to_all_single(out, given[rank], received, split[rank])
    same(out, torch.cat([given[s].split(split[s])[rank] for s in range(n)]))
    lists = [[values(10 * s + d, shape=(s + d + 1, 2)) for d in range(n)] for s in range(n)]
    outs = [torch.empty(s + rank + 1, 2) for s in range(n)]
    dist.all_to_all(outs, lists[rank])
    for s in range(n):
        same(outs[s], lists[s][rank])


@check
def rooted(rank: int, n: int) -> None:
    for root in range(n):
        mine = values(rank, torch.bfloat16)
        dist.broadcast(mine, root)
        same(mine, values(root, torch.bfloat16))
        column = torch.zeros(5, 6).t() if rank != root else values(rank)
        dist.broadcast(column, root)
        same(column, values(root))
        for dtype in (torch.float32, torch.float16):
            mine = values(rank, dtype)
            dist.reduce(mine, root, op=Kind.AVG)
            rows = [values(r, dtype) for r in range(n)]
            same(mine, reduced(rows, Kind.AVG) if rank == root else rows[rank], n == 2)
        gathered = [torch.empty(6, 5) for _ in range(n)] if rank == root else None
        dist.gather(values(rank), gathered, dst=root)
        if gathered is not None:
            same(torch.stack(gathered), torch.stack([values(r) for r in range(n)]))
        out = torch.empty(5, 6).t()
        dist.scatter(out, [values(root, seed=r) for r in range(n)] if rank == root else None, src=root)
        same(out, values(root, seed=rank))
    box: list[Any] = [None]
    dist.scatter_object_list(box, [{"for": r} for r in range(n)] if rank == 0 else None, src=0)
    assert box == [{"for": rank}]
    objects: list[Any] = [None] * n
    dist.all_gather_object(objects, "x" * (rank + 1))
    assert objects == ["x" * (r + 1) for r in range(n)]


@check
def point_to_point(rank: int, n: int) -> None:
    right, left = (rank + 1) % n, (rank - 1) % n
    out = torch.empty(6, 5, dtype=torch.bfloat16)
    works = [dist.isend(values(rank, torch.bfloat16), right), dist.irecv(out, left)]
    for work in works:
        work.wait()
    same(out, values(left, torch.bfloat16))
    # tags: received in the other order
    a, b = torch.empty(3), torch.empty(3)
    sends = [dist.isend(values(rank, shape=(3,), seed=t), right, tag=t) for t in (1, 2)]
    second, first = dist.irecv(b, left, tag=2), dist.irecv(a, left, tag=1)
    for work in (second, first, *sends):
        work.wait()
    same(a, values(left, shape=(3,), seed=1))
    same(b, values(left, shape=(3,), seed=2))
    # large ones, which need the receiver; every rank sends first
    big = torch.full((1 << 20,), float(rank))
    got = torch.empty(1 << 20, dtype=torch.float32)
    ops = [dist.P2POp(dist.isend, big, right), dist.P2POp(dist.irecv, got, left)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert (got == left).all()
    if rank == 0:
        senders = []
        for _ in range(n - 1):
            box = torch.empty(1)
            senders.append(dist.recv(box))
            assert box.item() == senders[-1]
        assert sorted(senders) == list(range(1, n))
    else:
        dist.send(torch.tensor([float(rank)]), 0)
    column = torch.zeros(4, 3)
    if rank == 0:
        dist.send(values(0, shape=(3, 4)).t(), n - 1)
    elif rank == n - 1:
        dist.recv(column, 0)
        same(column, values(0, shape=(3, 4)).t())
    if rank == 0:
        dist.send_object_list(["hello", rank], n - 1)
    elif rank == n - 1:
        box2: list[Any] = [None, None]
        dist.recv_object_list(box2, 0)
        assert box2 == ["hello", 0]


@check
def works_and_futures(rank: int, n: int) -> None:
    mine = values(rank)
    work = dist.all_reduce(mine, async_op=True)
    doubled = work.get_future().then(lambda future: future.value()[0] * 2)
    expected = reduced([values(r) for r in range(n)], Kind.SUM)
    same(doubled.wait(), expected * 2, n == 2)
    assert work.is_completed()
    assert work.is_success()
    assert work.exception() is None
    assert work.wait()
    same(work.result()[0], expected, n == 2)
    # a future that is asked for after the end
    same(work.get_future().wait()[0], expected, n == 2)
    # chained: a collective in the callback of another's future
    first, second = torch.ones(3), torch.ones(3)
    chain = (
        dist.all_reduce(first, async_op=True)
        .get_future()
        .then(lambda _: dist.all_reduce(second, async_op=True))
    )
    chain.wait().wait()
    same(second, torch.full((3,), float(n)))
    # many in flight, waited for in the other order
    tensors = [torch.full((1000,), float(i)) for i in range(30)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in reversed(works):
        work.wait()
    assert all((tensor == n * i).all() for i, tensor in enumerate(tensors))


@check
def goes_on_without_a_waiter(rank: int, n: int) -> None:
    """The thread in the background finishes it: nobody calls wait."""
    tensor = torch.ones(1 << 18)
    work = dist.all_reduce(tensor, async_op=True)
    until = time.monotonic() + 10
    while not work._operation.done and time.monotonic() < until:
        time.sleep(0.001)
    assert work._operation.done
    assert (tensor == n).all()


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
def functional_collectives(rank: int, n: int) -> None:
    """torch's traceable collectives, which reach the group from C++ by its name."""
    from torch.distributed import _functional_collectives as functional

    group = dist.group.WORLD
    total = functional.all_reduce(values(rank), "sum", group)
    same(total + 0, sum(values(r) for r in range(n)), n == 2)
    gathered = functional.all_gather_tensor(values(rank), 0, group)
    same(gathered + 0, torch.cat([values(r) for r in range(n)]))
    part = functional.reduce_scatter_tensor(values(rank, shape=(2 * n,)), "sum", 0, group)
    same(part + 0, reduced([values(r, shape=(2 * n,)) for r in range(n)], Kind.SUM).chunk(n)[rank], n == 2)
    moved = functional.all_to_all_single(values(rank, shape=(n, 2)), None, None, group)
    same(moved + 0, torch.stack([values(r, shape=(n, 2))[rank] for r in range(n)]))


@check
def ledger_counts_once(rank: int, n: int) -> None:
    comm.ledger.reset()
    comm.all_reduce(torch.ones(1000))
    (entry,) = comm.ledger.entries.values()
    assert (entry.calls, entry.message_bytes) == (1, 4000)


def train_plain(steps: int, dtype: torch.dtype = torch.float64) -> tuple[list[float], nn.Module]:
    model = training.build_model().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        loss = training.loss_of(model, *training.samples(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def train_wrapped(wrapped: nn.Module, rank: int, n: int, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    losses = []
    for step in range(steps):
        x, y = (whole.chunk(n)[rank] for whole in training.samples(step))
        loss = training.loss_of(wrapped, x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean, op=Kind.AVG)
        losses.append(mean.item())
    return losses


@check
def ddp(rank: int, n: int) -> None:
    for view, hook in ((False, False), (True, True)):
        model = nn.parallel.DistributedDataParallel(
            training.build_model().double(), gradient_as_bucket_view=view, bucket_cap_mb=0.001
        )
        if hook:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            model.register_comm_hook(None, default_hooks.allreduce_hook)
        found = train_wrapped(model, rank, n, 6)
        expected, plain = train_plain(6)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        for mine, theirs in zip(model.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@check
def fsdp2(rank: int, n: int) -> None:
    from torch.distributed.fsdp import fully_shard

    model = training.build_model().double()
    mesh = dist.init_device_mesh("cpu", (n,))
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = train_wrapped(model, rank, n, 6)
    expected, plain = train_plain(6)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.full_tensor(), theirs, rtol=1e-10, atol=1e-12)


@check
def pipelining(rank: int, n: int) -> None:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    def pieces() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Sequential(nn.Linear(7, 7), nn.Tanh()).double() for _ in range(n)]

    def distance(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (out - target).square().mean()

    for kind in (ScheduleGPipe, Schedule1F1B):
        mine, plain = pieces()[rank], nn.Sequential(*pieces())
        stage = PipelineStage(mine, rank, n, torch.device("cpu"))
        schedule = kind(stage, n_microbatches=4, loss_fn=distance)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (mine, plain)]
        for step in range(3):
            x, _ = training.samples(step)
            target = x.cos()
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses: list[torch.Tensor] = []
            given = {"target": target, "losses": losses} if rank == n - 1 else {}
            schedule.step(*([x] if rank == 0 else []), **given)
            expected = distance(plain(x), target)
            expected.backward()
            if rank == n - 1:
                torch.testing.assert_close(torch.stack(losses).mean(), expected, rtol=1e-12, atol=0)
            for optimizer in optimizers:
                optimizer.step()
        for found, right in zip(mine.parameters(), plain[rank].parameters(), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


ENGINE_RUNS = {
    **{f"stage {stage}": training.config(stage, 4) for stage in range(4)},
    **{f"stage {stage}, bf16": training.config(stage, 4, bf16=True) for stage in (0, 2, 3)},
    **{f"stage {stage}, aligned": training.config(stage, 4, xtrain={"aligned": True}) for stage in range(4)},
}
"""What xtrain's engine trains on MPI here, and on gloo in the test's own process pool."""


def engine(run: str) -> list[str]:
    """The losses of one run, exactly."""
    return [loss.hex() for loss in training.train(ENGINE_RUNS[run], 5)["losses"]]


@check
def engine_in_every_stage(rank: int, n: int) -> dict[str, list[str]]:
    return {run: engine(run) for run in ENGINE_RUNS}


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


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    comm.init_distributed("mpi", verbose=False, timeout=timedelta(seconds=30))
    rank, n = dist.get_rank(), dist.get_world_size()
    results: dict[str, Any] = {}
    for name, function in CHECKS.items():
        begun = time.monotonic()
        try:
            value, error = function(rank, n), ""
        except Exception:
            value, error = None, traceback.format_exc()
        results[name] = {"error": error, "value": value, "seconds": time.monotonic() - begun}
        (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    comm.init_distributed("mpi", verbose=False)  # once more in the same process
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
