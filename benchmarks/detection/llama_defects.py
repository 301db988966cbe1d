"""Defects of the held-out cases that lie in the model, the loss or the data; see held_out.py for their reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.detection.case import Change
from benchmarks.detection.llama import IGNORE_INDEX, Attention, RMSNorm, Rotary
from benchmarks.detection.training import Training

Batch = dict[str, Any]


def on_batch(alter: Callable[[Batch], Batch]) -> Change:
    """Every micro-batch is altered."""

    def change(t: Training) -> None:
        t.batch = lambda step, slot: {**(found := t.read(step, slot)), **alter(found)}

    return change


def in_each(kind: type[nn.Module], alter: Callable[[Any], None]) -> Change:
    """Every module of a kind is altered."""

    def all_of(model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                alter(module)

    return lambda t: t.model_made.append(all_of)


# ---------------------------------------------------------------- loss


def labelled(batch: Batch) -> float:
    """Labelled tokens of a micro-batch."""
    return float((batch["labels"] != IGNORE_INDEX).sum())


mean_of_means = on_batch(lambda batch: {"tokens": labelled(batch)})
"""Each micro-batch's loss is its own mean, and the step's the mean of those."""


def divided_by_ranks(t: Training) -> None:
    """The sum is divided by the number of tokens on all ranks, and the engine takes the mean over ranks besides."""
    t.batch = lambda step, slot: {**(found := t.read(step, slot)), "tokens": found["tokens"] * t.ranks}


def ignored_count(t: Training) -> None:
    """Positions that are not predicted count as tokens of the mean."""

    def batch(step: int, slot: int) -> Batch:
        found = t.read(step, slot)
        return {**found, "tokens": float(found["labels"].numel())}

    t.batch = batch


def _shifted(batch: Batch) -> Batch:
    labels = batch["labels"].roll(-1, dims=1)
    labels[:, -1] = IGNORE_INDEX
    return {"labels": labels}


shifted_twice = on_batch(_shifted)
"""Labels, which are the next tokens already, are shifted once more."""

# ---------------------------------------------------------------- packed rows


def _running_on(batch: Batch) -> Batch:
    length = batch["positions"].shape[1]
    return {"positions": torch.arange(length).expand_as(batch["positions"])}


positions_run_on = on_batch(_running_on)
"""Positions count through the row, not anew in each document."""

one_document = on_batch(lambda batch: {"documents": torch.zeros_like(batch["documents"])})
"""Attention reads the documents before, too."""


def _not_causal(model: Any) -> None:
    model.visible = lambda documents: (documents[:, :, None] == documents[:, None, :])[:, None]


def not_causal(t: Training) -> None:
    """Attention reads what follows in the document."""
    t.model_made.append(_not_causal)


# ---------------------------------------------------------------- modules


def _tile(attention: Any) -> None:
    attention.repeat = lambda x: x.repeat(1, attention.heads // attention.kv_heads, 1, 1)


tiled_heads = in_each(Attention, _tile)
"""Key and value heads in the order 0, 1, 0, 1 instead of 0, 0, 1, 1."""


def attention_scale(scale: float) -> Change:
    """Scores are multiplied by this instead of by the root of a head's size."""
    return in_each(Attention, lambda attention: setattr(attention, "scale", scale))


def rotary_base(base: float) -> Change:
    """Another base of the angles."""
    return in_each(Rotary, lambda rotary: setattr(rotary, "base", base))


def _angles_in(dtype: torch.dtype) -> Callable[[Any], None]:
    def alter(rotary: Any) -> None:
        def angles(positions: torch.Tensor) -> torch.Tensor:
            exponent = torch.arange(0, rotary.width, 2, dtype=torch.float32) / rotary.width
            frequencies = torch.pow(rotary.base, -exponent).to(dtype)
            return positions.to(dtype)[..., None] * frequencies

        rotary.angles = angles

    return alter


narrow_angles = in_each(Rotary, _angles_in(torch.bfloat16))
"""Positions times frequencies in bf16."""


def _neighbours(rotary: Any) -> None:
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x[..., 0::2], x[..., 1::2]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.stack(turned, dim=-1).flatten(-2)

    rotary.turn = turn


neighbouring_pairs = in_each(Rotary, _neighbours)
"""Pairs (x[2i], x[2i + 1]) are turned instead of (x[i], x[i + width / 2])."""


def norm_epsilon(epsilon: float) -> Change:
    """Another epsilon of the norms."""
    return in_each(RMSNorm, lambda norm: setattr(norm, "epsilon", epsilon))


def _narrow(norm: Any) -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.epsilon) * norm.weight

    norm.forward = forward


narrow_norms = in_each(RMSNorm, _narrow)
"""Norms in the parameters' dtype."""


def _narrow_softmax(attention: Any) -> None:
    def probabilities(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1)

    attention.probabilities = probabilities


narrow_softmax = in_each(Attention, _narrow_softmax)
"""Softmax in the parameters' dtype."""


def _detached(model: Any) -> None:
    model.embed.forward = lambda ids: F.embedding(ids, model.embed.weight.detach())


def no_embedding_gradient(t: Training) -> None:
    """The tied weight gets the head's gradient, and not the embedding's."""
    t.model_made.append(_detached)


# ---------------------------------------------------------------- dropout


def _dropouts(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, nn.Dropout))


def _other_when_recomputed(dropout: Any) -> None:
    plain = dropout.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch._C._current_graph_task_id() == -1:
            return plain(x)
        return x * plain(torch.ones_like(x)).roll(1, dims=1)

    dropout.forward = forward


def other_masks_when_recomputed(t: Training) -> None:
    """Layers are computed again in backward, where dropout draws other masks."""

    def change(model: Any) -> None:
        for layer in model.layers:
            layer.forward = lambda *args, run=layer.forward: checkpoint(run, *args, use_reentrant=False)
        for dropout in _dropouts(model):
            _other_when_recomputed(dropout)

    t.model_made.append(change)


def same_masks_on_ranks(t: Training) -> None:
    """Every rank draws rank 0's masks."""

    def change(engine: Any) -> None:
        place = engine._random.place
        engine._random.place = lambda: (place()[0], place()[1] % t.accumulation)

    t.engine_made.append(change)


def masks_begin_again(t: Training) -> None:
    """After a restart the masks are those of the beginning."""
    t.restart = True

    def change(engine: Any) -> None:
        place = engine._random.place
        engine._random.place = lambda: (place()[0] - t.middle, place()[1])

    t.after_load.append(change)


def no_dropout_from_middle(t: Training) -> None:
    """An evaluation in the middle leaves dropout switched off."""

    def after(step: int) -> None:
        if step == t.middle:
            for dropout in _dropouts(t.engine.module):
                dropout.p = 0.0

    t.after_update.append(after)


# ---------------------------------------------------------------- data


def data_from_the_beginning(t: Training) -> None:
    """After a restart the data begin again."""
    t.restart = True
    t.batch = lambda step, slot: t.read(step - t.middle * t.restarted, slot)


def same_epoch(steps: int) -> Change:
    """Every epoch, of so many steps, has the order of the first, where it should be shuffled anew."""

    def change(t: Training) -> None:
        t.batch = lambda step, slot: t.read((step - 1) % steps + 1, slot)

    return change
