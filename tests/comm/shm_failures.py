"""Ways in which a rank goes wrong on shared memory, one per start; tests/comm/test_shm.py starts the ranks."""

from __future__ import annotations

import atexit
import os
import signal
import time
import traceback
from datetime import timedelta
from typing import TextIO

import torch
import torch.distributed as dist

from xtrain import comm


def run(kind: str, rank: int, ranks: int, store: str, out: str) -> None:
    """One rank; what it has to say, errors included, goes to the file `out`."""
    with open(out, "w", buffering=1) as text:
        try:
            _go(kind, rank, ranks, store, text)
        except Exception:
            traceback.print_exc(file=text)
    atexit._run_exitfuncs()  # a process of multiprocessing leaves them out


def _go(kind: str, rank: int, ranks: int, store: str, text: TextIO) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=1.5 if kind == "stuck" else 30)
    comm.init_distributed(
        "shm", verbose=False, init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=patience
    )
    dist.all_reduce(torch.ones(1))
    if rank == 1:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "inside":  # in the middle of a long one
            dist.all_reduce(torch.ones(2**25), async_op=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "error":
            raise ValueError("the data of rank 1 are unreadable")
        if kind == "stuck":
            time.sleep(4)
            return
        if kind == "other":
            dist.all_gather_into_tensor(torch.ones(3), torch.ones(1))
            return
    begun = time.monotonic()
    try:
        if kind == "future":
            dist.all_reduce(torch.ones(1000), async_op=True).get_future().wait()
        else:
            dist.all_reduce(torch.ones(2**25 if kind == "inside" else 1000))
    finally:
        print(f"rank {rank} waited {time.monotonic() - begun:.1f} s", file=text)
