"""ZeRO stage 3 in scripts that do not train in the plainest way, against PyTorch in float64 on both ranks' data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training

STEPS, RATE = 4, 0.01
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


def _build(block: Callable[[], nn.Module] = toys.Block) -> nn.Module:
    torch.manual_seed(0)
    return toys.Stack(block)


def _inputs(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, toys.WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def _square(model: Any, _: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def _reference(build: Callable[[], nn.Module] = _build, loss: Loss = _square) -> dict[str, torch.Tensor]:
    model = build().double()
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


def _train_and_compare(build: Callable[[], nn.Module], loss: Loss) -> None:
    engine = _engine(build())
    for step in range(STEPS):
        engine.backward(loss(engine, engine.module, _inputs(step, engine.grid.rank)))
        engine.step()
    _compare(engine, _reference(build, loss))


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


@dataclass
class Result:
    """A class that torch's pytree does not know."""

    hidden: Any


class OwnMapping(dict[str, Any]):
    """Nor this one."""


WRAPPERS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], torch.Tensor]]] = {
    "dataclass": (lambda x: Result((x, None)), lambda y: y.hidden[0]),
    "mapping": (lambda x: OwnMapping(hidden=Result([x])), lambda y: y["hidden"].hidden[0]),
    "namespace": (lambda x: SimpleNamespace(hidden=x), lambda y: y.hidden),
}


def _returns(kind: str) -> None:
    class Returns(nn.Module):
        """Uses its parameter itself and returns a class of its own."""

        def __init__(
            self, wrap: Callable[[torch.Tensor], Any], unwrap: Callable[[Any], torch.Tensor]
        ) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(toys.WIDTH, toys.WIDTH) / toys.WIDTH)
            self.wrap, self.unwrap = wrap, unwrap

        def forward(self, x: Any) -> Any:
            x = x if torch.is_tensor(x) else self.unwrap(x)
            return self.wrap(x + torch.tanh(x @ self.weight))

    class Unwrapping(toys.Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(self.blocks[0].unwrap(x))

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Unwrapping(lambda: Returns(*WRAPPERS[kind]))

    _train_and_compare(build, _square)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_outputs_in_classes_of_the_scripts_own(ranks: Any, kind: str) -> None:
    ranks(2, _returns, kind)


def _with_asides(model: Any, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean() + sum(block.aside for block in module.blocks)


def _asides() -> None:
    class Aside(toys.Block):
        """Keeps a loss of its own in an attribute, as routers of experts do."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.up(x))
            y = x + self.down(hidden)
            self.aside = self.up(hidden).square().mean()
            return y

    _train_and_compare(lambda: _build(Aside), _with_asides)


def test_losses_that_modules_keep_in_attributes(ranks: Any) -> None:
    ranks(2, _asides)


def _interrupted() -> None:
    engine = _engine(_build())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for step in range(STEPS):
        x = _inputs(step, engine.grid.rank)
        handle = engine.module.blocks[1].down.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine(x)
        handle.remove()
        engine.backward(engine(x).square().mean())
        engine.step()
    _compare(engine, _reference())


def test_training_goes_on_after_ctrl_c_in_a_forward(ranks: Any) -> None:
    ranks(2, _interrupted)


def _penalised(model: Any, _: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_(True)
    y = model(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return y.square().mean() + (slope.norm(dim=1) - 1).square().mean()


def _gradient_penalty() -> None:
    _train_and_compare(_build, _penalised)


def test_gradient_penalty(ranks: Any) -> None:
    ranks(2, _gradient_penalty)


def _copied() -> None:
    engine = _engine(_build())
    x = _inputs(0, 0)
    with xtrain.zero.GatheredParameters(engine.module.parameters()):
        average = copy.deepcopy(engine.module)
    wanted = engine(x).detach()
    if engine.grid.rank == 0:  # would wait for the other rank if it were to gather
        torch.testing.assert_close(average(x), wanted)
    assert all(not param.numel() for param in engine.module.parameters())


def test_a_copy_of_the_model_runs_on_its_own(ranks: Any) -> None:
    ranks(2, _copied)


def _whole_model_is_a_leaf(stage: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = toys.ByRank()
    xtrain.utils.set_z3_leaf_modules(model, [toys.ByRank])
    engine = _engine(model, stage)
    for step in range(2):
        engine.backward(engine(_inputs(step, engine.grid.rank)).square().mean())
        engine.step()
    return {name: value.clone() for name, value in engine.module_state_dict().items()}


def test_the_whole_model_may_be_a_leaf_module(ranks: Any) -> None:
    found, wanted = ranks(2, _whole_model_is_a_leaf, 3)[0], ranks(2, _whole_model_is_a_leaf, 0)[0]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def _functional_transform() -> tuple[str, bool]:
    model = _build()
    engine = _engine(model)
    rows = _inputs(0, 0)[:, None].float()
    with pytest.raises(
        xtrain.base.errors.NotImplementedYetError, match=r"torch\.func over a model"
    ) as caught:
        torch.func.vmap(engine)(rows)
    with xtrain.zero.GatheredParameters(list(model.parameters())):
        mapped = torch.func.vmap(engine)(rows)
        return str(caught.value), torch.allclose(mapped, engine(rows), atol=1e-6)


def test_torch_func_says_how(ranks: Any) -> None:
    for said, same in ranks(2, _functional_transform):
        assert "GatheredParameters" in said
        assert same
