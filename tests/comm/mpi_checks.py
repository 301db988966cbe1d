"""Checks of the MPI process group, run by every rank under mpiexec; tests/comm/test_mpi.py starts them.

    mpiexec -n 2 python -m tests.comm.mpi_checks FOLDER     writes FOLDER/<rank>.json: check -> error, value, seconds

Expected values are computed on the spot from every rank's inputs, without communication.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.comm import mpi_collectives, mpi_groups, mpi_training
from xtrain import comm

# In this order: the last one leaves groups unusable.
CHECKS = {**mpi_collectives.CHECKS, **mpi_training.CHECKS, **mpi_groups.CHECKS}


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
