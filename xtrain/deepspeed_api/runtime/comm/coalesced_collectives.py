"""`deepspeed.runtime.comm.coalesced_collectives`: one message for the sums of many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xtrain import comm
from xtrain.base.stand_ins import refused_class
from xtrain.comm import ProcessGroup

all_to_all_quant_reduce = refused_class("runtime.comm.coalesced_collectives.all_to_all_quant_reduce")
all_to_all_loco_quant_reduce = refused_class(
    "runtime.comm.coalesced_collectives.all_to_all_loco_quant_reduce"
)


@torch.no_grad()
def reduce_scatter_coalesced(
    tensors: Sequence[torch.Tensor], group: ProcessGroup | None = None
) -> list[torch.Tensor]:
    """This rank's piece of the mean over the ranks of each tensor.

    Args:
        tensors: equal shapes on all ranks, one dtype and device.
        group: the ranks; None: all.

    Returns:
        for each tensor a one-dimensional piece of its elements: ceil(elements / ranks) of them, fewer or none at the
        end of the tensor.
    """
    ranks, rank = comm.get_world_size(group), comm.get_rank(group)
    widths = [-(-tensor.numel() // ranks) for tensor in tensors]
    sent = tensors[0].new_zeros(ranks, sum(widths))
    start = 0
    for tensor, width in zip(tensors, widths, strict=True):
        pieces = tensor.reshape(-1).split(width) if width else ()
        for row, piece in zip(sent, pieces, strict=False):
            row[start : start + piece.numel()] = (
                piece / ranks
            )  # before the sum, which could overflow in float16
        start += width
    received = sent.new_empty(sum(widths))
    comm.reduce_scatter_tensor(received, sent.view(-1), group=group)
    own = received.split(widths)
    left = [
        max(0, min(width, tensor.numel() - rank * width))
        for tensor, width in zip(tensors, widths, strict=True)
    ]
    return [piece[:length] for piece, length in zip(own, left, strict=True)]


__all__ = ["all_to_all_loco_quant_reduce", "all_to_all_quant_reduce", "reduce_scatter_coalesced"]
