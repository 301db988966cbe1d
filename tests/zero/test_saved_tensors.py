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

from tests.zero.test_stage3_corners import WIDTH, _square, _train_and_compare

# ---------------------------------------------------------------- outputs that are changed in place


class Pair(nn.Module):
    """Returns two views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.both(x)
        return y[..., :WIDTH], y[..., WIDTH:]


class Chunks(Pair):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.both(x).chunk(2, dim=-1)


class InItsInput(nn.Module):
    """Changes what it was given, and returns that."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.tanh(x) @ self.weight
        return x


def _added(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x)
    h += x
    return h


def _relu(net: Net, x: torch.Tensor) -> torch.Tensor:
    return F.relu(net.first(x), inplace=True)


def _masked(net: Net, x: torch.Tensor) -> torch.Tensor:
    return net.first(x).masked_fill_(x > 0.5, 0.0)


def _turned(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.first(x)
    h.transpose(0, 1).mul_(x.transpose(0, 1))
    h[:, 0] = 0.5
    return h


def _pair(net: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = net.pair(x)
    left += x
    right += 2 * x
    return left + right


def _chunks(net: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = net.chunks(x)
    return left * right


def _twice(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = net.own(net.first(x))
    h += x
    h = net.own(h)
    h *= 2
    return h


def _checkpointed(net: Net, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda y: _added(net, y), x, use_reentrant=False)


def _reentrant(net: Net, x: torch.Tensor) -> torch.Tensor:
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


class Net(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.pair, self.chunks, self.own = Pair(), Chunks(), InItsInput()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(2, 2, WIDTH)  # a Linear's output is a view for such inputs
        for block in self.blocks:
            h = WAYS[self.way](self, x)
            x = x + F.relu(block(h), inplace=True)
        return x


def _in_place(way: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(way)

    _train_and_compare(build, _square)


@pytest.mark.parametrize("way", WAYS)
def test_outputs_that_are_changed_in_place(ranks: Any, way: str) -> None:
    ranks(2, _in_place, way)


# ---------------------------------------------------------------- frozen modules that are checkpointed


class Lora(nn.Module):
    """As PEFT builds them: the frozen layer, and trained ones in dictionaries of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(WIDTH, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, WIDTH, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.conv = nn.Conv1d(1, 1, 3, padding=1).requires_grad_(False)
        self.up, self.down = Lora(), Lora()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.norm(x)[:, None])[:, 0]
        return x + self.down(torch.tanh(self.up(h)))


class Adapted(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 3).requires_grad_(False)
        self.how = how

    def _pair(self, x: torch.Tensor) -> torch.Tensor:
        """A checkpoint around checkpoints."""
        for layer in self.layers[:2]:
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if "input" in self.how:
            x.requires_grad_(True)  # as enable_input_require_grads does
        layers = list(self.layers)
        if "nested" in self.how:
            x = checkpoint(self._pair, x, use_reentrant=False)
            layers = layers[2:]
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant="reentrant" in self.how)
        return self.head(x)


def _adapted(how: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Adapted(how)
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

    model = Adapted(how)
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
