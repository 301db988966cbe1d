"""16-bit cases that the detector was tuned by: a small GLM with dropout, and changes that the fp32 table has, too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.detection import defects, harmless
from benchmarks.detection.case import Case, Change, nothing
from benchmarks.detection.training import LENGTH, SEED, Training
from xtrain.data.corpus import find_files
from xtrain.data.infilling import InfillingSampler
from xtrain.data.tokens import prepare

VOCABULARY = 512


class SmallGLM(Training):
    """Two layers of half the width: 16 bits are slow on the host. Masks of dropout are those of aligned mode."""

    steps, warmup, middle = 100, 10, 50
    precision: dict[str, Any] = {}

    def __init__(self, folder: Path, ranks: int) -> None:
        super().__init__(folder, ranks)
        sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_size": 176}
        self.architecture.update(sizes, vocab_size=VOCABULARY, dropout=0.1)
        self.config.update(self.precision)
        self.section(aligned=True)

    def make_sampler(self) -> Any:
        """As the larger GLM's."""
        return InfillingSampler(prepare(find_files(None), VOCABULARY), LENGTH, SEED)


class Bf16(SmallGLM):
    """In bf16."""

    precision = {"bf16": {"enabled": True}}


class Fp16(SmallGLM):
    """In fp16 with a dynamic loss scale, which grows four times and never overflows.

    Near the limit the last bit decides at which step it does, and so which step correct runs skip.
    """

    precision = {"fp16": {"enabled": True, "initial_scale_power": 11, "loss_scale_window": 20}}


def wide_probabilities(t: Training) -> None:
    """Attention whose scores and probabilities stay in float32, as fused kernels keep them."""

    def change(model: Any) -> None:
        for layer in model.layers:
            layer.attention.forward = _wide(layer.attention)

    t.model_made.append(change)


def _wide(own: Any) -> Any:
    def forward(x: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x.shape
        qkv = own.query_key_value(x).view(batch, length, 3, own.heads, hidden // own.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        query, key = own._turn(query, positions), own._turn(key, positions)
        scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(hidden // own.heads)
        probabilities = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)
        probabilities = F.dropout(probabilities, own.dropout.p, own.training)
        context = (probabilities @ value.float()).to(x.dtype)
        found: torch.Tensor = own.dense(context.transpose(1, 2).reshape(batch, length, hidden))
        return found

    return forward


def _case(precision: type[SmallGLM], title: str, change: Change, **more: Any) -> Case:
    name = precision.__name__.lower()
    return Case(f"GLM {name}: {title}", change, reference=f"GLM {name}", training=precision, **more)


QKV, DENSE_IN = defects.QKV, defects.DENSE_IN

TUNED_REFERENCES = tuple(
    Case(name, nothing, reference=name, training=precision)
    for name, precision in (("GLM bf16", Bf16), ("GLM fp16", Fp16))
)

_BOTH: tuple[tuple[str, Change, str], ...] = (
    ("Adam's beta2 is 0.959 instead of 0.95", defects.optimizer(betas=[0.9, 0.959]), ""),
    ("the schedule is one step late", defects.late_schedule, ""),
    (
        "one gradient is not cleared between micro-batches",
        defects.on_gradient(f"layers.0.{DENSE_IN}.weight", defects.not_cleared),
        f"layers.0.{DENSE_IN}",
    ),
    ("no dropout in one place", defects.no_dropout("layers.1.dropout"), "layers.1.dropout"),
)
_ONE: tuple[tuple[str, Change, str], ...] = (
    ("Adam's epsilon is 1e-6 instead of 1e-8", defects.optimizer(eps=1e-6), ""),
    ("Adam without bias correction", defects.optimizer(bias_correction=False), ""),
    ("L2 regularisation instead of decoupled weight decay", defects.optimizer("Adam", adam_w_mode=False), ""),
    ("weight decay on biases and norms", defects.decay_vectors, ""),
    ("no clipping on rank 1", defects.no_clipping_on_rank_1, ""),
    ("the norm that is clipped by is off by 1e-4", defects.inexact_norm, ""),
    (
        "one gradient is rank 0's, not the mean",
        defects.on_gradient(f"layers.1.{QKV}.weight", defects.not_reduced),
        f"layers.1.{QKV}",
    ),
    ("gradients are summed over ranks, not averaged", defects.summed_over_ranks, ""),
    ("the loss is divided by the world size twice", defects.loss_over_wrong_world, ""),
    ("the last micro-batch brings no gradient", defects.last_micro_batch_lost, ""),
    ("the loss is a mean over the tokens of two samples at a time", defects.larger_micro_batch, ""),
    ("both ranks read the same samples", defects.same_data_everywhere, ""),
    ("the last token of the context is masked causally", defects.shorter_context, ""),
    ("restart without optimizer state", defects.restarted(load_optimizer_states=False), ""),
    ("restart without the schedule", defects.restarted(load_lr_scheduler_states=False), ""),
    (
        "GELU by tanh in one module",
        defects.in_module("layers.0.mlp", defects.tanh_gelu),
        f"layers.0.{defects.DENSE_OUT}",
    ),
    (
        "LayerNorm's epsilon is 1e-6 in one module",
        defects.in_module("layers.0.attention_norm", defects.norm_epsilon),
        "layers.0.attention_norm",
    ),
    ("dropout masks depend on the rank", defects.masks_by_rank, "layers.0.attention.dropout"),
)
TUNED_DEFECTS = (
    *(_case(Bf16, title, change, module=module) for title, change, module in (*_BOTH, *_ONE)),
    *(_case(Fp16, title, change, module=module) for title, change, module in _BOTH),
)
TUNED_HARMLESS = (
    _case(Bf16, "ZeRO stage 0", harmless.zero(0)),
    _case(Bf16, "ZeRO stage 2", harmless.zero(2)),
    _case(Bf16, "ZeRO stage 3", harmless.zero(3, stage3_param_persistence_threshold=0)),
    _case(Bf16, "1 rank, 4 micro-batches", nothing, ranks=1),
    _case(Bf16, "4 ranks, 1 micro-batch", nothing, ranks=4),
    _case(Bf16, "two threads, 1 rank", harmless.two_threads, ranks=1),
    _case(Bf16, "probabilities in float32", wide_probabilities),
    _case(Bf16, "activation checkpointing", harmless.checkpointing),
    _case(Bf16, "PyTorch's AdamW", harmless.torch_adam),
    _case(Fp16, "1 rank, 4 micro-batches", nothing, ranks=1),
    _case(Fp16, "probabilities in float32", wide_probabilities),
)
