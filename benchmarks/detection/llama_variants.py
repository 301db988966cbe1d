"""Harmless differences of the held-out cases that lie in the model or in how it is run; see held_out.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.detection.case import Change
from benchmarks.detection.llama import IGNORE_INDEX, Attention, RMSNorm, SwiGLU
from benchmarks.detection.llama_defects import in_each
from benchmarks.detection.training import Training
from xtrain.reproducible.aligned_random import random_words


def _fused(attention: Any) -> None:
    attention.context = lambda query, key, value, mask: F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=attention.scale
    )


fused_attention = in_each(Attention, _fused)
"""PyTorch's kernel in place of the explicit formula."""


def _divided_last(attention: Any) -> None:
    def context(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        scores = ((query * attention.scale) @ key.transpose(-1, -2)).float()
        scores = scores.masked_fill(~mask, float("-inf"))
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        read = weights.to(value.dtype) @ value
        return (read.float() / weights.sum(-1, keepdim=True)).to(value.dtype)

    attention.context = context


divided_last = in_each(Attention, _divided_last)
"""The query is scaled instead of the scores, and the softmax's sum is divided by after the values are added."""


def _one_product(attention: Any) -> None:
    kept: list[torch.Tensor] = []

    def first(x: torch.Tensor) -> torch.Tensor:
        parts = (attention.q, attention.k, attention.v)
        all_three = F.linear(x, torch.cat([part.weight for part in parts]))
        query, *kept[:] = all_three.split([part.weight.shape[0] for part in parts], dim=-1)
        return query

    attention.q.forward = first
    attention.k.forward = lambda _: kept[0]
    attention.v.forward = lambda _: kept[1]


one_product_for_qkv = in_each(Attention, _one_product)
"""Query, key and value by one product with their weights together."""


def _gate_and_up(mlp: Any) -> None:
    kept: list[torch.Tensor] = []

    def first(x: torch.Tensor) -> torch.Tensor:
        gate, *kept[:] = F.linear(x, torch.cat([mlp.gate.weight, mlp.up.weight])).chunk(2, dim=-1)
        return gate

    mlp.gate.forward = first
    mlp.up.forward = lambda _: kept[0]


one_product_for_gate = in_each(SwiGLU, _gate_and_up)
"""Gate and value by one product with their weights together."""


def _fused_norm(norm: Any) -> None:
    norm.forward = lambda x: F.rms_norm(x, x.shape[-1:], norm.weight, norm.epsilon)


fused_norms = in_each(RMSNorm, _fused_norm)
"""PyTorch's RMSNorm, which multiplies by the weight before it rounds."""


def _own_cross_entropy(model: Any) -> None:
    def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        wide, wanted = logits.float(), labels != IGNORE_INDEX
        chosen = wide.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        return ((wide.logsumexp(-1) - chosen) * wanted).sum()

    model.losses = losses


def own_cross_entropy(t: Training) -> None:
    """Cross entropy as a difference of the logarithm of the sum and the logit."""
    t.model_made.append(_own_cross_entropy)


def two_samples(t: Training) -> None:
    """Two samples at a time; each has the dropout masks that it has alone."""
    t.micro = 2

    def change(engine: Any) -> None:
        dropouts: list[Any] = [module for module in engine.module.modules() if isinstance(module, nn.Dropout)]
        for call, dropout in enumerate(dropouts):
            dropout.forward = _by_sample(engine._random, call, dropout.p, t.micro)

    t.engine_made.append(change)


def _by_sample(random: Any, call: int, p: float, samples: int) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        step, slot = random.place()
        rows = [
            random_words(x[0].numel(), random.seed, (call, slot * samples + index, step), x.device)
            for index in range(x.shape[0])
        ]
        keep = (torch.stack(rows) >= round(p * 2.0**32)).view(x.shape)
        return x * (keep.to(x.dtype) * (1.0 / (1.0 - p)))

    return forward


def pytorch_adam(**options: Any) -> Change:
    """PyTorch's AdamW, passed to initialize(), with these options."""
    from benchmarks.detection.harmless import torch_adam

    def change(t: Training) -> None:
        t.config["optimizer"]["params"].update(options)
        torch_adam(t)

    return change
