"""Ways in which a rank goes wrong under MPI, one per start; tests/comm/test_mpi.py starts them.

mpiexec -n 2 python -m tests.comm.mpi_failures KIND
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
from xtrain.errors import BackendError


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
