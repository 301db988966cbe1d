"""One case under mpiexec: mpiexec -n 2 python -m benchmarks.detection.mpi TITLE FOLDER"""

import sys

import torch

from benchmarks.detection.cases import perform
from xtrain.comm import init_distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    init_distributed("mpi", verbose=False)
    perform(sys.argv[1], sys.argv[2], "")
    torch.distributed.destroy_process_group()
