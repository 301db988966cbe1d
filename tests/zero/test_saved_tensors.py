"""ZeRO stage 3: backward has what it needs, after in-place changes of outputs and in checkpoints of frozen modules.

Against PyTorch in float64 on both ranks' data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests import toys
from tests.zero.test_stage3_corners import _square, _train_and_compare

# ---------------------------------------------------------------- outputs that are changed in place


def _added(net: Any, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x)
    h += x
    return h


def _relu(net: Any, x: torch.Tensor) -> torch.Tensor:
    return F.relu(net.first(x), inplace=True)


def _masked(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net.first(x).masked_fill_(x > 0.5, 0.0)


def _turned(net: Any, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x)
    h.transpose(0, 1).mul_(x.transpose(0, 1))
    h[:, 0] = 0.5
    return h


def _pair(net: Any, x: torch.Tensor) -> torch.Tensor:
    left, right = net.pair(x)
    left += x
    right += 2 * x
    return left + right


def _chunks(net: Any, x: torch.Tensor) -> torch.Tensor:
    left, right = net.chunks(x)
    return left * right


def _twice(net: Any, x: torch.Tensor) -> torch.Tensor:
    h = net.own(net.first(x))
    h += x
    h = net.own(h)
    h *= 2
    return h


def _checkpointed(net: Any, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda y: _added(net, y), x, use_reentrant=False)


def _reentrant(net: Any, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda y: _added(net, y), x.requires_grad_(True), use_reentrant=True)


WAYS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "add": _added,
    "relu": _relu,
    "mask": _masked,
    "views of views": _turned,
    "tuple": _pair,
    "chunks": _chunks,
    "input": _twice,
    "checkpoint": _checkpointed,
    "reentrant": _reentrant,
}


def _in_place(way: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return toys.ChangedInPlace(WAYS[way])

    _train_and_compare(build, _square)


@pytest.mark.parametrize("way", WAYS)
def test_outputs_that_are_changed_in_place(ranks: Any, way: str) -> None:
    ranks(2, _in_place, way)


# ---------------------------------------------------------------- frozen modules that are checkpointed


def _adapted(how: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = toys.LoraStack(how)
        for layer in model.layers:
            for lora in (layer.up, layer.down):
                nn.init.normal_(lora.lora_B["default"].weight)
        return model

    _train_and_compare(build, _square)


@pytest.mark.parametrize("how", ["", "input", "nested input", "reentrant input"])
def test_frozen_modules_in_checkpoints(ranks: Any, how: str) -> None:
    ranks(2, _adapted, how)


def _frozen_parameters_are_empty_after(how: str) -> None:
    from tests.zero.test_stage3_corners import _engine, _inputs

    model = toys.LoraStack(how)
    engine = _engine(model)
    sizes: list[int] = []
    for step in range(2):
        loss = engine(_inputs(step, engine.grid.rank)).square().mean()
        model.layers[0].up.lora_A["default"].weight.register_hook(
            lambda _: sizes.append(
                sum(
                    group._full[bucket.start].untyped_storage().nbytes()
                    for group in engine.partition.frozen
                    for bucket in group.layout.buckets
                )
            )
        )
        loss.backward()
        assert all(param.numel() == 0 for param in model.parameters())
        engine.step()
    every = sum(group.layout.total * 4 for group in engine.partition.frozen)
    assert 0 < max(sizes) < every / 2  # shapes stay for the length of a backward, memory does not


def test_frozen_parameters_are_not_kept(ranks: Any) -> None:
    ranks(2, _frozen_parameters_are_empty_after, "input")
