"""Checks of the MPI process group: every call against its definition, works and futures."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.comm.mpi_tools import COMPLEX, FLOATS, INTEGERS, Check, Kind, listed_in, reduced, same, values
from xtrain import comm

CHECKS: dict[str, Check] = {}
check = listed_in(CHECKS)


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
