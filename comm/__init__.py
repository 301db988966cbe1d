"""Collectives between ranks: the interface of `deepspeed.comm`, every call counted in a ledger.

Imports the backends below it and nothing above it.
"""

from torch.distributed import ReduceOp

from xtrain.comm.canonical import CanonicalAllReduce, CanonicalReduceScatter, tree_sum
from xtrain.comm.collectives import (
    all_gather,
    all_gather_into_tensor,
    all_gather_object,
    all_reduce,
    all_to_all_single,
    barrier,
    broadcast,
    broadcast_object_list,
    recv,
    reduce,
    reduce_scatter_tensor,
    send,
)
from xtrain.comm.direct import SliceAllReduce, SliceGather, SliceSum
from xtrain.comm.groups import (
    TORCH_DISTRIBUTED_DEFAULT_PORT,
    companion,
    destroy_process_group,
    get_global_rank,
    get_local_rank,
    get_rank,
    get_world_group,
    get_world_size,
    init_distributed,
    is_available,
    is_initialized,
    mpi_discovery,
    new_group,
)
from xtrain.comm.ledger import (
    Ledger,
    get_comm_operation_count,
    get_logged_comm_ops,
    has_comm_data,
    ledger,
    log_summary,
    reset_log,
)
from xtrain.comm.timing import CommsLogger, comms_logger, configure

__all__ = [
    "TORCH_DISTRIBUTED_DEFAULT_PORT",
    "CanonicalAllReduce",
    "CanonicalReduceScatter",
    "CommsLogger",
    "Ledger",
    "ReduceOp",
    "SliceAllReduce",
    "SliceGather",
    "SliceSum",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "comms_logger",
    "companion",
    "configure",
    "destroy_process_group",
    "get_comm_operation_count",
    "get_global_rank",
    "get_local_rank",
    "get_logged_comm_ops",
    "get_rank",
    "get_world_group",
    "get_world_size",
    "has_comm_data",
    "init_distributed",
    "is_available",
    "is_initialized",
    "ledger",
    "log_summary",
    "mpi_discovery",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter_tensor",
    "reset_log",
    "send",
    "tree_sum",
]
