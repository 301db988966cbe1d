"""Attention over divided sequences is that of the whole sequence: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.sequence.layer import DistributedAttention


class _Attention(torch.nn.Module):
    """Over (positions, batch, heads, size), or (batch, positions, heads, size)."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, *qkv: torch.Tensor) -> torch.Tensor:
        moved = [x.movedim((1 - self.positions, 2), (0, 1)) for x in qkv]
        return scaled_dot_product_attention(*moved, is_causal=True).movedim((0, 1), (1 - self.positions, 2))


def _run(positions: int, heads: int) -> None:
    torch.manual_seed(3)
    shape = (8, 2, heads, 3) if positions == 0 else (2, 8, heads, 3)
    whole = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    own = [x.detach().chunk(2, positions)[dist.get_rank()].clone().requires_grad_() for x in whole]
    expected = _Attention(positions)(*whole)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    layer = DistributedAttention(_Attention(positions), dist.group.WORLD, 2, positions)
    found = layer(*own, 1 - positions)
    mine = [x.chunk(2, positions)[dist.get_rank()] for x in (expected, weights)]
    torch.testing.assert_close(found, mine[0])
    (found * mine[1]).sum().backward()
    for part, full in zip(own, whole, strict=True):
        assert full.grad is not None
        torch.testing.assert_close(part.grad, full.grad.chunk(2, positions)[dist.get_rank()])


@pytest.mark.parametrize("positions", [0, 1])
def test_it_is_the_attention_of_the_whole(ranks: Callable[..., list[Any]], positions: int) -> None:
    ranks(2, _run, positions, 4)


def _mistakes() -> None:
    with pytest.raises(
        ConfigError, match=r"3 entries \(heads, on the way in\), which 2 sequence-parallel ranks"
    ):
        _run(0, 3)
    layer = DistributedAttention(_Attention(0), dist.group.WORLD)
    with pytest.raises(NotImplementedYetError, match="rotate query and key before"):
        layer(*[torch.ones(4, 1, 2, 2)] * 3, 1, rotary_pos_emb=(1, 2))
    for more in ({"sp_stream": 1}, {"num_kv_heads": 3}):
        with pytest.raises(NotImplementedYetError, match="DistributedAttention"):
            DistributedAttention(_Attention(0), dist.group.WORLD, **more)


def test_what_it_cannot_do_is_told(ranks: Callable[..., list[Any]]) -> None:
    ranks(2, _mistakes)
