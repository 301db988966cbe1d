"""`deepspeed.constants`: the port of rank 0, and how long a process group waits."""

from xtrain.comm import TORCH_DISTRIBUTED_DEFAULT_PORT
from xtrain.comm.timeouts import default_timeout

default_pg_timeout = default_timeout()

__all__ = ["TORCH_DISTRIBUTED_DEFAULT_PORT", "default_pg_timeout"]
