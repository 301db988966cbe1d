"""Ways in which a rank goes wrong on shared memory, one per start; tests/comm/test_shm.py starts the ranks.

RANK=0 WORLD_SIZE=3 python -m tests.comm.shm_failures KIND FILE
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from xtrain import comm


def main(kind: str, file: str) -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    patience = timedelta(seconds=1.5 if kind == "stuck" else 30)
    comm.init_distributed(
        "shm", verbose=False, init_method=f"file://{file}", rank=rank, world_size=ranks, timeout=patience
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
        print(f"rank {rank} waited {time.monotonic() - begun:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
