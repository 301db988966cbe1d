"""A small Llama in plain PyTorch, for rows of packed documents.

RMSNorm, rotary positions, grouped-query attention, SwiGLU, residual dropout, tied embeddings (Touvron et al., 2023).
Every projection, norm, rotary and dropout is a module of its own, so that a guilty one can be named. Methods are small,
so that a case can put another one in the place of one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100
"""Label of positions that are not predicted."""


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants."""

    vocab_size: int = 512
    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    ffn_size: int = 176
    dropout: float = 0.1
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def head_size(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_heads


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 whatever the parameters are in."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) to the same."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (wide * scale).to(x.dtype) * self.weight


class Rotary(nn.Module):
    """Turns pairs (x[i], x[i + width / 2]) of queries and keys by their position (Su et al., 2021)."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.base = width, base

    def angles(self, positions: Tensor) -> Tensor:
        """(batch, length) positions to (batch, length, width / 2) angles in float32."""
        exponent = torch.arange(0, self.width, 2, device=positions.device, dtype=torch.float32) / self.width
        return positions.float()[..., None] * torch.pow(self.base, -exponent)

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One tensor (batch, heads, length, width)."""
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def forward(self, query: Tensor, key: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Both, turned."""
        angles = self.angles(positions)[:, None]
        cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        return self.turn(query, cos, sin), self.turn(key, cos, sin)


class Attention(nn.Module):
    """Grouped-query attention: a key and value head serves several neighbouring query heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.num_heads, config.num_kv_heads, config.head_size
        self.scale = self.width**-0.5
        self.q = nn.Linear(config.hidden_size, self.heads * self.width, bias=False)
        self.k = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=False)
        self.v = nn.Linear(config.hidden_size, self.kv_heads * self.width, bias=False)
        self.rotary = Rotary(self.width, config.rotary_base)
        self.o = nn.Linear(self.heads * self.width, config.hidden_size, bias=False)

    def split(self, x: Tensor, heads: int) -> Tensor:
        """(batch, length, heads * width) to (batch, heads, length, width)."""
        return x.view(*x.shape[:2], heads, self.width).transpose(1, 2)

    def repeat(self, x: Tensor) -> Tensor:
        """Key or value heads, each as often as it has query heads: 0, 0, 1, 1."""
        return x.repeat_interleave(self.heads // self.kv_heads, dim=1)

    def probabilities(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Softmax in float32."""
        wide = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min)
        return wide.softmax(dim=-1).to(scores.dtype)

    def context(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """What each position reads, (batch, heads, length, width)."""
        scores = (query @ key.transpose(-1, -2)) * self.scale
        return self.probabilities(scores, mask) @ value

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x: (batch, length, hidden); positions: (batch, length); mask: (batch, 1, length, length)."""
        query = self.split(self.q(x), self.heads)
        key, value = self.split(self.k(x), self.kv_heads), self.split(self.v(x), self.kv_heads)
        query, key = self.rotary(query, key, positions)
        read = self.context(query, self.repeat(key), self.repeat(value), mask)
        return self.o(read.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    """Feed-forward with a SiLU gate (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_size, bias=False)
        self.down = nn.Linear(config.ffn_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Norms before, dropout after each half."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config)
        self.attention_dropout = nn.Dropout(config.dropout)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = SwiGLU(config)
        self.mlp_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), positions, mask))
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)))


class Llama(nn.Module):
    """The language model; its head has the embeddings' weight."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.head.weight = self.embed.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal, 0.02 for embeddings and in proportion to the inputs' number elsewhere."""
        for name, param in self.named_parameters():
            if param.ndim > 1:
                std = 0.02 if name.startswith("embed") else param.shape[1] ** -0.5
                nn.init.normal_(param, std=std)

    def visible(self, documents: Tensor) -> Tensor:
        """(batch, 1, length, length): which keys a query sees, those of its document up to itself."""
        place = torch.arange(documents.shape[1], device=documents.device)
        causal = place[None, :] <= place[:, None]
        return (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum of the cross entropies at labelled positions, in float32."""
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")

    def forward(
        self, input_ids: Tensor, positions: Tensor, documents: Tensor, labels: Tensor, tokens: float
    ) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            input_ids: (batch, length) int64.
            positions: (batch, length) int64, of each token in its document.
            documents: (batch, length) int64, number of each token's document.
            labels: (batch, length) int64, IGNORE_INDEX where nothing is predicted.
            tokens: what the sum is divided by.
        """
        mask = self.visible(documents)
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.losses(self.head(self.norm(x)), labels) / tokens
