"""Ways in which a rank goes wrong under MPI, one per start; tests/comm/test_mpi.py starts them.

mpiexec -n 2 python -m tests.comm.mpi_failures KIND
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.base.errors import BackendError

Call = Callable[[Any], Any]
MISMATCHES: dict[str, tuple[Call, Call]] = {
    # A rank alone in save_checkpoint, while the others reduce gradients.
    "operation": (
        lambda group: dist.all_gather_object([None, None], "x" * 100, group=group),
        lambda group: comm.reduce_scatter_tensor(torch.ones(1), torch.ones(2), group=group),
    ),
    "elements": (
        lambda group: dist.all_reduce(torch.ones(1000), group=group),
        lambda group: dist.all_reduce(torch.ones(1001), group=group),
    ),
    "a large one": (
        lambda group: dist.all_reduce(torch.ones(2**20), group=group),
        lambda group: comm.all_gather_into_tensor(torch.ones(2**20), torch.ones(2**19), group=group),
    ),
    "dtype": (
        lambda group: dist.all_reduce(torch.ones(8), group=group),
        lambda group: dist.all_reduce(torch.ones(8, dtype=torch.int32), group=group),
    ),
    "reduction": (
        lambda group: dist.all_reduce(torch.ones(8), group=group),
        lambda group: dist.all_reduce(torch.ones(8), dist.ReduceOp.MAX, group=group),
    ),
    "root": (
        lambda group: dist.broadcast(torch.ones(8), 0, group=group),
        lambda group: dist.broadcast(torch.ones(8), 1, group=group),
    ),
    "barrier": (
        lambda group: dist.barrier(group),
        lambda group: dist.all_to_all_single(torch.ones(2), torch.ones(2), group=group),
    ),
    "in a future": (
        lambda group: dist.all_reduce(torch.ones(8), group=group, async_op=True).get_future().wait(),
        lambda group: dist.all_gather([torch.ones(1)] * 2, torch.ones(1), group=group),
    ),
}
"""What ranks 0 and 1 call at the same time."""


def mismatches(folder: str) -> None:
    """Each in a group of its own, which it leaves unusable; then the library must still work elsewhere."""
    rank = dist.get_rank()
    results: dict[str, tuple[float, str]] = {}
    for name, calls in MISMATCHES.items():
        group = dist.new_group([0, 1])
        begun = time.monotonic()
        try:
            calls[rank](group)
            told = "nothing"
        except (BackendError, RuntimeError) as error:
            told = str(error)
        results[name] = time.monotonic() - begun, told.splitlines()[0]
    total = torch.ones(3)
    dist.all_reduce(total)
    results["after"] = 0.0, str(total.tolist())
    # What is printed may be lost when the job is aborted.
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


def late(rank: int) -> None:
    """Rank 1 waits in another group; rank 2 computes."""
    pair, short = dist.new_group([1, 3]), dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=4))
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1000), group=short)
        except BackendError as error:
            print(error, flush=True)
    elif rank == 1:
        dist.broadcast(torch.ones(7), 3, group=pair)
        dist.all_reduce(torch.ones(1000), group=short)
    elif rank == 2:
        time.sleep(8)
        dist.all_reduce(torch.ones(1000), group=short)
    else:
        time.sleep(1)
        work = dist.all_reduce(torch.ones(1000), group=short, async_op=True)
        try:
            work.wait(timedelta(seconds=20))
        except BackendError as error:
            print(error, flush=True)
        time.sleep(2)
        dist.broadcast(torch.ones(7), 3, group=pair)


def main(kind: str) -> None:
    if kind == "wrong size":
        try:
            comm.init_distributed("mpi", rank=int(os.environ["PMI_RANK"]), world_size=3)
        except BackendError as error:
            print(f"refused: {error}", flush=True)
        other = 1 - int(os.environ["PMI_RANK"])  # in another order than MPI's own
        comm.init_distributed("mpi", rank=other, world_size=2, verbose=False)
        senders: list[object] = [None, None]
        dist.all_gather_object(
            senders, (os.environ["PMI_RANK"], os.environ["RANK"], os.environ["LOCAL_RANK"])
        )
        assert senders == [("1", "0", "0"), ("0", "1", "1")], senders
        return
    if kind == "mixed":
        mine = "gloo" if os.environ["PMI_RANK"] == "0" else "mpi"
        try:
            limit = timedelta(
                seconds=3 if mine == "gloo" else 9
            )  # mpiexec ends the job with the first that fails
            comm.init_distributed(mine, verbose=False, timeout=limit)
        except BackendError as error:
            print(error, flush=True)
            time.sleep(20)
            sys.exit(1)
    comm.init_distributed("mpi", verbose=False, timeout=timedelta(seconds=60))
    dist.all_reduce(torch.ones(1))
    if kind == "mismatches":
        return mismatches(sys.argv[2])
    if kind == "late":
        return late(dist.get_rank())
    if dist.get_rank() == 1:
        if kind == "killed":
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "error":
            raise ValueError("the data of rank 1 are unreadable")
        if kind == "left":
            return  # without a word: it thinks that it is done
    if kind == "left":
        dist.all_reduce(torch.ones(1000), async_op=True).get_future().wait()
    else:
        dist.all_reduce(torch.ones(1000))


if __name__ == "__main__":
    main(sys.argv[1])
