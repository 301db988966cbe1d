"""One case under mpiexec: mpiexec -n 2 python -m benchmarks.detection.mpi TITLE FOLDER [STEPS]"""

import sys

import torch

from benchmarks.detection.cases import perform
from xtrain.comm import init_distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed("mpi", verbose=False)
    perform(sys.argv[1], sys.argv[2], "", int(sys.argv[3]) if len(sys.argv) > 3 else None)
    torch.distributed.destroy_process_group()
