"""ZeRO stage 3 in scripts that do not train in the plainest way, against PyTorch in float64 on both ranks' data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import training

WIDTH, STEPS, RATE = 8, 4, 0.01
Loss = Callable[[Any, nn.Module, torch.Tensor], torch.Tensor]
"""(engine or module, module, inputs) -> loss."""


def _engine(model: nn.Module, stage: int = 3, **more: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_optimization": training.zero(stage, 0, **more),
        "optimizer": {"type": "AdamW", "params": {"lr": RATE}},
    }
    return xtrain.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _build(block: Callable[[], nn.Module] = Block) -> nn.Module:
    torch.manual_seed(0)
    return Net(block)


def _inputs(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def _square(model: Any, _: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def _reference(block: Callable[[], nn.Module] = Block, loss: Loss = _square) -> dict[str, torch.Tensor]:
    model = _build(block).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (loss(model, model, _inputs(step, rank).double()) / 2).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def _compare(engine: Any, wanted: dict[str, torch.Tensor]) -> None:
    found = engine.module_state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-6)


POLICIES: dict[str, dict[str, Any]] = {
    "next": {},
    "prefetch": {"stage3_prefetch_bucket_size": 10000},
    "reuse": {"stage3_prefetch_bucket_size": 10000, "stage3_max_reuse_distance": 100000},
}


def _forward_before_step(policy: str) -> None:
    engine = _engine(_build(), **POLICIES[policy])
    for step in range(STEPS):
        x = _inputs(step, engine.grid.rank)
        engine.backward(engine(x).square().mean())
        engine(x)  # for a log, with gradients on and no backward: it gathers ahead
        engine.step()
    _compare(engine, _reference())


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_gathered_ahead_does_not_survive_a_step(ranks: Any, policy: str) -> None:
    ranks(2, _forward_before_step, policy)


def _forward_before_set(how: str) -> None:
    engine = _engine(_build(), **POLICIES["prefetch"])
    x = _inputs(0, 0)
    for _ in range(2):
        engine.backward(engine(x).square().mean())
        engine.step()
    plain = _build()
    for param in plain.parameters():
        nn.init.constant_(param, 0.1)
    engine(x)
    if how == "load":
        engine.load_module_state_dict(plain.state_dict())
    else:
        for param in engine.module.parameters():
            xtrain.utils.safe_set_full_fp32_param(param, torch.full(param.ds_shape, 0.1))
    torch.testing.assert_close(engine(x), plain(x))


@pytest.mark.parametrize("how", ["load", "set"])
def test_what_was_gathered_ahead_does_not_survive_new_weights(ranks: Any, how: str) -> None:
    ranks(2, _forward_before_set, how)
