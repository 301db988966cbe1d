"""GLM: autoregressive blank infilling on one transformer (Du et al., ACL 2022; Zeng et al., ICLR 2023).

Part A of a sample (the corrupted text) is attended bidirectionally, part B (the blanks) causally. As
in GLM-130B: rotary positions, DeepNorm (post-LN), GeGLU, softmax in fp32 with scaled queries, and a
shrunk embedding gradient. How samples are made is in xtrain.data.infilling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = -100
"""Label of positions that are not predicted (all of part A)."""


@dataclass(frozen=True)
class GLMConfig:
    """Sizes of a GLM. `rotary`: "1d" as in GLM-130B (position 1 turns the whole head), "2d" as in
    ChatGLM-6B (position 1 turns its first half, position 2 within the blank its second)."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    ffn_size: int
    rotary: Literal["1d", "2d"] = "2d"
    dropout: float = 0.0
    embedding_gradient_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}")
        head, multiple = self.hidden_size // self.num_heads, 4 if self.rotary == "2d" else 2
        if head % multiple:
            raise ValueError(
                f"a head has {head} elements, which {self.rotary} rotary positions need divisible by {multiple}"
            )


def attention_mask(context_lengths: Tensor, length: int) -> Tensor:
    """Which key each query sees: all of part A, and of part B nothing that comes later.

    Args:
        context_lengths: (batch,) number of tokens in part A.
        length: tokens in parts A and B together.

    Returns:
        (batch, 1, length, length) bool, True where query i sees key j: j < context or j <= i.
    """
    position = torch.arange(length, device=context_lengths.device)
    causal = position[None, :] <= position[:, None]
    in_context = position[None, None, :] < context_lengths[:, None, None]
    return (causal[None] | in_context)[:, None]


def rotary_angles(positions: Tensor, width: int) -> Tensor:
    """(batch, length, width / 2) angles in float32 of rotary embedding (Su et al., 2021), base 10000."""
    exponent = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    return positions.float()[..., None] * torch.pow(10000.0, -exponent)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn pairs (x[i], x[i + width / 2]) of the last dimension by `angles` (batch, length, width / 2)."""
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head attention whose scores stay small in low precision.

    The query is divided by the layer's number before the product and the scores are multiplied by it
    in fp32, just before the softmax (query-key layer scaling).
    """

    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.rotary = config.num_heads, config.rotary
        self.scale = float(layer + 1)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.rotary == "1d":
            return rotate(x, rotary_angles(positions[:, 0], x.shape[-1]))
        halves = x.chunk(2, dim=-1)
        turned = [rotate(h, rotary_angles(positions[:, i], h.shape[-1])) for i, h in enumerate(halves)]
        return torch.cat(turned, dim=-1)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """x: (batch, length, hidden); positions: (batch, 2, length); mask: (batch, 1, length, length)."""
        batch, length, hidden = x.shape
        qkv = self.query_key_value(x).view(batch, length, 3, self.heads, hidden // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = self._turn(query, positions), self._turn(key, positions)
        query = query / (math.sqrt(hidden // self.heads) * self.scale)
        scores = query @ key.transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * self.scale
        probabilities = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1).to(x.dtype)
        context = self.dropout(probabilities) @ value
        return self.dense(context.transpose(1, 2).reshape(batch, length, hidden))


class GeGLU(nn.Module):
    """Feed-forward with a GELU gate (Shazeer, 2020)."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.dense_in = nn.Linear(config.hidden_size, 2 * config.ffn_size)
        self.dense_out = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        value, gate = self.dense_in(x).chunk(2, dim=-1)
        return self.dense_out(value * F.gelu(gate))


class Layer(nn.Module):
    """DeepNorm (Wang et al., 2022): LayerNorm(alpha x + f(x)) with alpha = sqrt(2 layers)."""

    def __init__(self, config: GLMConfig, layer: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * config.num_layers)
        self.attention = Attention(config, layer)
        self.attention_norm = nn.LayerNorm(config.hidden_size)
        self.mlp = GeGLU(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """(batch, length, hidden) to the same."""
        x = self.attention_norm(self.alpha * x + self.dropout(self.attention(x, positions, mask)))
        return self.mlp_norm(self.alpha * x + self.dropout(self.mlp(x)))


class GLM(nn.Module):
    """The language model; output weights are tied to the word embeddings."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier normal; value, output and feed-forward weights scaled by (2 layers)^-1/2; biases zero."""
        gain = (2 * self.config.num_layers) ** -0.5
        nn.init.normal_(self.word_embeddings.weight, std=0.02)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            query, key, value = layer.attention.query_key_value.weight.chunk(3)
            nn.init.xavier_normal_(query)
            nn.init.xavier_normal_(key)
            for weight in (
                value,
                layer.attention.dense.weight,
                layer.mlp.dense_in.weight,
                layer.mlp.dense_out.weight,
            ):
                nn.init.xavier_normal_(weight, gain=gain)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedded, alpha = self.word_embeddings(input_ids), self.config.embedding_gradient_alpha
        # Values stay the same, the gradient is multiplied by alpha (GLM-130B's cure for loss spikes).
        return embedded if alpha == 1.0 else embedded * alpha + embedded.detach() * (1 - alpha)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, context_lengths: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Logits, or the loss when labels are given.

        Args:
            input_ids: (batch, length) int64, part A then part B.
            position_ids: (batch, 2, length) int64, position in part A and position within the blank.
            context_lengths: (batch,) int64, tokens in part A.
            labels: (batch, length) int64, IGNORE_INDEX where nothing is predicted.

        Returns:
            (batch, length, vocabulary) logits in the parameters' dtype, or the mean cross entropy in nats
            over the labelled positions, a float32 scalar (float64 in a float64 model).
        """
        mask = attention_mask(context_lengths, input_ids.shape[1])
        x = self._embed(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids, mask)
        if labels is None:
            return F.linear(x, self.word_embeddings.weight)
        predicted = labels != IGNORE_INDEX
        logits = F.linear(x[predicted], self.word_embeddings.weight)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[predicted])
