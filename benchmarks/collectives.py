"""Time of collectives: gloo, xtrain's shared memory (flat, and as two hosts), MPI, and a copy in memory, interleaved.

    torchrun --nproc-per-node 2 benchmarks/collectives.py [--dtype fp32 bf16] [--largest 256]
    mpiexec -n 4 python benchmarks/collectives.py --mpi              # with MPI, too
    torchrun --nproc-per-node 2 benchmarks/collectives.py --exchange # gloo's own calls against comm/direct.py

All libraries live in the same processes and take turns, so that drift of a shared machine hits all alike. Printed are
medians over the rounds, of the slowest rank each time: gloo's in microseconds, the others as gloo's time over theirs.
`window`: the buffer lies in shared memory and is read in place; `copy`: one copy of the buffer within its process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.comm import deterministic, shm
from xtrain.comm.point_to_point import exchange

Calls = dict[str, Callable[[], object]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--smallest", type=int, default=1, help="KiB")
    parser.add_argument("--largest", type=int, default=256, help="MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mpi", action="store_true", help="with MPI's group; needs mpiexec and mpi4py")
    parser.add_argument("--exchange", action="store_true")
    return parser.parse_args()


def groups(mpi: bool) -> dict[str, dist.ProcessGroup]:
    """One group of all ranks for each library."""
    everybody = list(range(dist.get_world_size()))
    made = {name: dist.new_group(everybody, backend=name) for name in ("gloo", "shm")}
    if len(everybody) > 2:
        os.environ["XTRAIN_SHM_HOST"] = f"half {dist.get_rank() % 2}"
        made["2 hosts"] = dist.new_group(everybody, backend="shm")
        del os.environ["XTRAIN_SHM_HOST"]
    if mpi:
        made["mpi"] = dist.group.WORLD
    return made


def all_reduces(elements: int, dtype: torch.dtype, made: dict[str, dist.ProcessGroup]) -> Calls:
    """The same all-reduce by every library."""

    def call(tensor: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], object]:
        return lambda: dist.all_reduce(tensor, group=group)

    calls = {name: call(torch.zeros(elements, dtype=dtype), group) for name, group in made.items()}
    calls["window"] = call(shm.zeros(elements, dtype), made["shm"])
    first, second = torch.zeros(elements, dtype=dtype), torch.zeros(elements, dtype=dtype)
    calls["copy"] = lambda: first.copy_(second)
    return calls


def exchanges(elements: int, dtype: torch.dtype, gloo: dist.ProcessGroup) -> Calls:
    """gloo's reduce-scatter and all-gather against messages between every two ranks, as in comm/direct.py."""
    ranks, me = dist.get_world_size(), dist.get_rank()
    width = -(-elements // ranks)
    full, mine = torch.zeros(width * ranks, dtype=dtype), torch.zeros(width, dtype=dtype)
    rows = list(full.view(ranks, -1).unbind())
    space = [torch.zeros(width, dtype=dtype) for _ in range(ranks)]

    def trade(received: list[torch.Tensor], sent: list[torch.Tensor]) -> None:
        others = [[None if peer == me else row for peer, row in enumerate(side)] for side in (received, sent)]
        for work in exchange(*others, gloo):
            work.wait()

    def scatter() -> None:
        trade(space, rows)
        deterministic.tree_sum([rows[me] if peer == me else row for peer, row in enumerate(space)])

    return {
        "gloo": lambda: comm.reduce_scatter_tensor(mine, full, group=gloo),
        "direct": scatter,
        "gloo gather": lambda: comm.all_gather_into_tensor(full, mine, group=gloo),
        "direct gather": lambda: trade(rows, [rows[me]] * ranks),
    }


def measure(calls: Calls, size: int, rounds: int, gloo: dist.ProcessGroup) -> dict[str, float]:
    """Median seconds of a call; the first round warms up and is not counted.

    Each turn is several calls in a row, as the buckets of a training step are.
    """
    repeats = max(4, min(20, 2**23 // size))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            dist.barrier(gloo)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            slowest = torch.tensor((time.perf_counter() - start) / repeats)
            dist.all_reduce(slowest, dist.ReduceOp.MAX, gloo)
            if round_:
                seconds[name].append(slowest.item())
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    shm.register()
    comm.init_distributed("mpi" if args.mpi else "gloo", verbose=False)
    made = groups(args.mpi)
    if dist.get_rank() == 0:
        print(f"ranks: {dist.get_world_size()}, torch {torch.__version__}, medians of {args.rounds} rounds")
    for dtype in args.dtype:
        size = args.smallest * 2**10
        while size <= args.largest * 2**20:
            elements = size // DTYPES[dtype].itemsize
            calls = (
                exchanges(elements, DTYPES[dtype], made["gloo"])
                if args.exchange
                else all_reduces(elements, DTYPES[dtype], made)
            )
            seconds = measure(calls, size, args.rounds, made["gloo"])
            if dist.get_rank() == 0:
                base = seconds.pop("gloo")
                others = "".join(f"  {name} {base / value:6.2f}" for name, value in seconds.items())
                print(f"{dtype} {size // 1024:>7} KiB  gloo {base * 1e6:>9.0f} us{others}", flush=True)
            size *= 4
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
