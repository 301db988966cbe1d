"""Stage 0 hands the optimizer the model's parameters: whatever it makes of them is what plain PyTorch makes."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import training
from xtrain.base.errors import CheckpointError, ConfigError
from xtrain.base.log import logger


class Shapely(torch.optim.Optimizer):
    """Looks at everything that slices do not have: shapes, rows, norms of parameters, and how many there are."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.seen: list[list[tuple[int, ...]]] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.seen = [[tuple(p.shape) for p in group["params"]] for group in self.param_groups]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["rows"] = torch.zeros(p.shape[:1], dtype=p.dtype)
                    state["name"] = len(self.state)
                state["step"] += 1
                rows = p.grad.square().mean(tuple(range(1, p.ndim))) if p.ndim > 1 else p.grad.square()
                state["rows"].lerp_(rows, 0.1)
                scale = state["rows"].sqrt().add(1e-6).view(-1, *[1] * (p.ndim - 1))
                p.add_(p.grad / scale, alpha=-group["lr"] * float(p.norm()) / len(group["params"]))


OPTIMIZERS: dict[str, Any] = {
    "shapely": Shapely,
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
}


def _plain(name: str, steps: int) -> dict[str, torch.Tensor]:
    model = training.build_model()
    optimizer = OPTIMIZERS[name](training.param_groups(model))
    for step in range(steps):
        optimizer.zero_grad()
        training.loss_of(model, *training.samples(step)).backward()
        optimizer.step()
    return model.state_dict()


def _engine(name: str, given: str = "object", **more: Any) -> Any:
    model = training.build_model()
    groups = training.param_groups(model)
    settings = training.config(0, micro=16 // xtrain.comm.get_world_size(), gradient_clipping=0, **more)
    settings = {key: value for key, value in settings.items() if key not in ("optimizer", "scheduler")}
    if given == "object":
        return xtrain.initialize(model=model, optimizer=OPTIMIZERS[name](groups), config=settings)[0]
    return xtrain.initialize(
        model=model, optimizer=OPTIMIZERS[name], model_parameters=groups, config=settings
    )[0]


def _trained(name: str, given: str) -> tuple[dict[str, torch.Tensor], bool, Any]:
    engine = _engine(name, given)
    for step in range(4):
        training.engine_step(engine, step)
    module = set(engine.module.parameters())
    own = all(p in module for group in engine.optimizer.param_groups for p in group["params"])
    return engine.module_state_dict(), own, getattr(engine.basic_optimizer, "seen", None)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("world", "given"), [(1, "object"), (2, "callable")])
def test_any_optimizer_is_exact(ranks: Any, name: str, world: int, given: str) -> None:
    expected = _plain(name, 4)
    for state, own, seen in ranks(world, _trained, name, given):
        assert own
        assert seen in (None, [[(33, 7), (5, 33)], [(33,), (5,)]])
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def _bf16_masters() -> list[tuple[tuple[int, ...], torch.dtype]]:
    engine = _engine("adafactor", bf16=True)
    training.engine_step(engine, 0)
    return [(tuple(p.shape), p.dtype) for group in engine.optimizer.param_groups for p in group["params"]]


def test_masters_have_the_parameters_shapes(ranks: Any) -> None:
    shapes = [(33, 7), (5, 33), (33,), (5,)]
    assert ranks(2, _bf16_masters)[0] == [(shape, torch.float32) for shape in shapes]


def _mixed(which: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    class Mixed(nn.Module):
        """A bf16 embedding before an fp32 head, under a config that casts nothing."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.embedding = nn.Embedding(11, 6, dtype=torch.bfloat16)
            self.head = nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(x).float()).square().mean()

    found = []
    for plain in (True, False):
        model = Mixed()
        make: Any = torch.optim.AdamW if which == "torch" else xtrain.ops.adam.FusedAdam
        optimizer = make(model.parameters(), lr=0.05)
        engine: Any = None
        if not plain:
            settings = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": 0}
            engine = xtrain.initialize(model=model, optimizer=optimizer, config=settings)[0]
        for step in range(6):
            x = torch.randint(11, (3,), generator=torch.Generator().manual_seed(step))
            if plain:
                optimizer.zero_grad()
                model(x).backward()
                optimizer.step()
            else:
                engine.backward(engine(x))
                engine.step()
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found[0], found[1]


@pytest.mark.parametrize("which", ["torch", "own"])
@pytest.mark.parametrize("world", [1, 2])
def test_mixed_dtypes_are_updated_in_their_own(ranks: Any, which: str, world: int) -> None:
    """To the bit: on two ranks with the same data the mean is exact."""
    for plain, engine in ranks(world, _mixed, which):
        for name, value in plain.items():
            assert torch.equal(engine[name], value), name


def _continued() -> dict[str, torch.Tensor]:
    """An optimizer that has taken steps goes on in stage 0, as it would without an engine."""
    model = training.build_model()
    optimizer = OPTIMIZERS["adamw"](training.param_groups(model))
    for step in range(2):
        optimizer.zero_grad()
        training.loss_of(model, *training.samples(step)).backward()
        optimizer.step()
    late, used = copy.deepcopy(model), copy.deepcopy(optimizer)
    used.param_groups[0]["params"] = list(late.parameters())
    settings = {"train_micro_batch_size_per_gpu": 16, "gradient_clipping": 0}
    with pytest.raises(ConfigError, match="taken steps already"):
        xtrain.initialize(model=late, optimizer=used, config={**settings, "bf16": {"enabled": True}})
    engine = xtrain.initialize(model=model, optimizer=optimizer, config=settings)[0]
    for step in (2, 3):
        training.engine_step(engine, step)
    return engine.module_state_dict()


def test_a_stepped_optimizer_goes_on(ranks: Any) -> None:
    expected = _plain("adamw", 4)
    for key, value in ranks(1, _continued)[0].items():
        assert torch.equal(value, expected[key])


def _frozen_counts() -> tuple[list[int], bool, list[str]]:
    """Frozen parameters stay in their group; above stage 0 an untested optimizer is warned of."""
    model = training.build_model()
    model.first.weight.requires_grad_(False)
    before = model.first.weight.clone()
    optimizer = Shapely(model.parameters())
    settings = training.config(0, micro=16)
    del settings["optimizer"], settings["scheduler"]
    engine = xtrain.initialize(model=model, optimizer=optimizer, config=settings)[0]
    training.engine_step(engine, 0)
    counts = [len(group["params"]) for group in engine.optimizer.param_groups]
    unchanged = torch.equal(before, model.first.weight)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    settings.update(zero_optimization={"stage": 1}, zero_allow_untested_optimizer=True)
    again = training.build_model()
    xtrain.initialize(model=again, optimizer=Shapely(again.parameters()), config=settings)
    logger.removeHandler(handler)
    return counts, unchanged, said


def test_groups_are_complete_and_slices_are_warned_of(ranks: Any) -> None:
    counts, unchanged, said = ranks(1, _frozen_counts)[0]
    assert counts == [4]
    assert unchanged
    assert any("Shapely" in line and "one-dimensional slices" in line for line in said)


def _saved(name: str, folder: str) -> None:
    engine = _engine(name)
    for step in range(2):
        training.engine_step(engine, step)
    engine.save_checkpoint(folder)


def _resumed(name: str, folder: str) -> dict[str, torch.Tensor]:
    engine = _engine(name)
    training.engine_step(engine, 7)  # what is loaded replaces it
    engine.load_checkpoint(folder)
    for step in (2, 3):
        training.engine_step(engine, step)
    return engine.module_state_dict()


@pytest.mark.parametrize("name", ["shapely", "adafactor", "adamw"])
def test_states_of_whole_parameters_are_saved(ranks: Any, tmp_path: Path, name: str) -> None:
    ranks(1, _saved, name, str(tmp_path))
    expected = _plain(name, 4)
    for state in ranks(2, _resumed, name, str(tmp_path)):
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def _sliced(name: str, folder: str) -> dict[str, torch.Tensor]:
    """Load what stage 0 has saved in stage 1."""
    model = training.build_model()
    settings = training.config(1, micro=8, gradient_clipping=0, zero_allow_untested_optimizer=True)
    del settings["optimizer"], settings["scheduler"]
    optimizer = OPTIMIZERS[name](training.param_groups(model))
    engine = xtrain.initialize(model=model, optimizer=optimizer, config=settings)[0]
    engine.load_checkpoint(folder)
    for step in (2, 3):
        training.engine_step(engine, step)
    return engine.module_state_dict()


def test_they_are_refused_where_slices_are_kept(ranks: Any, tmp_path: Path) -> None:
    for name in ("adafactor", "adamw"):
        ranks(1, _saved, name, str(tmp_path / name))
    with pytest.raises(CheckpointError, match="of the whole parameter"):
        ranks(2, _sliced, "adafactor", str(tmp_path / "adafactor"))
    expected = _plain("adamw", 4)
    for key, value in ranks(2, _sliced, "adamw", str(tmp_path / "adamw"))[0].items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


def _lost(folder: str) -> None:
    """States that can neither be cut nor shared are told at the save, and missed at the load."""
    model = training.build_model()
    settings = training.config(1, micro=16, zero_allow_untested_optimizer=True)
    del settings["optimizer"], settings["scheduler"]
    engine = xtrain.initialize(model=model, optimizer=Odd(model.parameters(), lr=0.1), config=settings)[0]
    training.engine_step(engine, 0)
    engine.save_checkpoint(folder)
    with pytest.raises(CheckpointError, match="lacks the optimizer's half"):
        engine.load_checkpoint(folder)
    engine.load_checkpoint(folder, load_optimizer_states=False)


class Odd(torch.optim.SGD):
    """Keeps half as many numbers as its tensor has."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["half"] = torch.zeros(p.numel() // 2)
        return super().step(closure)


def test_states_of_slices_are_not_taken_for_others(ranks: Any, tmp_path: Path) -> None:
    ranks(1, _lost, str(tmp_path))
