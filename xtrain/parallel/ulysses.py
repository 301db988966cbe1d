"""Sequence-parallel attention by all-to-all (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xtrain import comm
from xtrain.base.errors import ConfigError, NotImplementedYetError


def _exchange(x: torch.Tensor, scatter: int, gather: int, group: Any) -> torch.Tensor:
    """Cut `x` along one dimension, and put what the others send together along another."""
    size = dist.get_world_size(group)
    if x.shape[scatter] % size:
        raise ConfigError(
            f"DistributedAttention: dimension {scatter} has {x.shape[scatter]} entries (heads, on the way in), "
            f"which {size} sequence-parallel ranks cannot divide evenly: take a number of ranks that divides it"
        )
    sent = torch.stack(x.chunk(size, scatter)).contiguous()
    received = torch.empty_like(sent)
    comm.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(0), gather)


class _AllToAll(torch.autograd.Function):
    """Its own gradient is the exchange in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scatter: int, gather: int, group: Any) -> torch.Tensor:
        ctx.way = scatter, gather, group
        return _exchange(x, scatter, gather, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scatter, gather, group = ctx.way
        return _exchange(grads[0], gather, scatter, group), None, None, None


class DistributedAttention(nn.Module):
    """Attention over sequences that are divided over ranks: each rank computes some heads of all positions.

    Args:
        local_attention: computes the context from query, key and value that have all positions and this rank's heads.
        sequence_process_group: the ranks that share a sequence.
        scatter_idx: dimension of the heads.
        gather_idx: dimension of the positions.
        sp_stream: must be None: the exchanges are not overlapped.
        num_kv_heads: must be None or divisible by the ranks.

    Source: https://www.deepspeed.ai/tutorials/ds-sequence/
    """

    def __init__(
        self,
        local_attention: nn.Module,
        sequence_process_group: Any,
        scatter_idx: int = 2,
        gather_idx: int = 0,
        sp_stream: Any = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if sp_stream is not None:
            raise NotImplementedYetError(
                "DistributedAttention(sp_stream=...)", "leave it out: the numbers are the same"
            )
        size = dist.get_world_size(sequence_process_group)
        if num_kv_heads is not None and num_kv_heads % size:
            raise NotImplementedYetError(
                f"DistributedAttention with {num_kv_heads} key-value heads on {size} ranks",
                "take a number of sequence-parallel ranks that divides them",
            )
        self.local_attn, self.spg = local_attention, sequence_process_group
        self.scatter_idx, self.gather_idx = scatter_idx, gather_idx

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch_dim_idx: int = 0,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Of this rank's positions.

        Args:
            query, key, value: of shape (positions of this rank, batch, heads, head size), or with batch and positions
                the other way round; the attributes say which dimensions are positions and heads.
            batch_dim_idx: accepted as DeepSpeed's; the dimensions say all.
            rotary_pos_emb: must be None.
            args, kwargs: for the local attention.

        Returns:
            The local attention's output with all heads and this rank's positions.
        """
        if rotary_pos_emb is not None:
            raise NotImplementedYetError(
                "DistributedAttention with rotary_pos_emb",
                "rotate query and key before, by their own positions",
            )
        own = [_AllToAll.apply(x, self.scatter_idx, self.gather_idx, self.spg) for x in (query, key, value)]
        context = self.local_attn(*own, *args, **kwargs)
        out: torch.Tensor = _AllToAll.apply(context, self.gather_idx, self.scatter_idx, self.spg)
        return out
