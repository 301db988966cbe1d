"""`apex.parallel`: data parallelism and batch norm over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed import ReduceOp

from xtrain.shims.apex import refused
from xtrain.shims.apex.parallel.distributed import DistributedDataParallel, Reducer
from xtrain.shims.apex.parallel.LARC import LARC
from xtrain.shims.apex.parallel.sync_batchnorm import SyncBatchNorm

__all__ = [
    "LARC",
    "DistributedDataParallel",
    "ReduceOp",
    "Reducer",
    "SyncBatchNorm",
    "convert_syncbn_model",
    "create_syncbn_process_group",
]

__getattr__ = refused.attributes(__name__)


def convert_syncbn_model(
    module: nn.Module, process_group: Any = None, channel_last: bool = False
) -> nn.Module:
    """The module with every batch norm replaced by SyncBatchNorm, which takes over its parameters and statistics."""
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module
    result = module
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        result = SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats,
            process_group, channel_last,
        )  # fmt: skip
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            setattr(result, name, tensor)
        result.train(module.training)
    for name, child in module.named_children():
        result.add_module(name, convert_syncbn_model(child, process_group, channel_last))
    return result


def create_syncbn_process_group(group_size: int) -> Any:
    """The group of `group_size` ranks in a row that this rank is in; None, for all ranks, when it is 0.

    Raises:
        ValueError: it does not divide the number of ranks.
    """
    if group_size == 0:
        return None
    ranks = torch.distributed.get_world_size()
    if ranks % group_size:
        raise ValueError(f"groups of {group_size} do not divide {ranks} ranks")
    groups = [
        torch.distributed.new_group(list(range(first, first + group_size)))
        for first in range(0, ranks, group_size)
    ]
    return groups[torch.distributed.get_rank() // group_size]
