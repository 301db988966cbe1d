"""`deepspeed.constants`: the port of rank 0, and how long a process group waits."""

from xtrain.comm import TORCH_DISTRIBUTED_DEFAULT_PORT
from xtrain.comm.timeouts import default_timeout

default_pg_timeout = default_timeout()

CROSS_RANK, CROSS_SIZE = "CROSS_RANK", "CROSS_SIZE"
"""Variables of the environment: number of this node, and of nodes."""

__all__ = ["CROSS_RANK", "CROSS_SIZE", "TORCH_DISTRIBUTED_DEFAULT_PORT", "default_pg_timeout"]
