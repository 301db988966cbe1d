"""torch.compile with stages 0 to 3: engine.compile(), and what was compiled before initialize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import toys, training
from tests.zero.test_stage3 import engine_of, ids_of, three_steps
from xtrain.base.errors import ConfigError

Ranks = Callable[..., list[Any]]
STEPS = 5


def _graphs() -> int:
    """Compiled since the last reset."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _curve(how: str, backend: str, stage: int, bf16: bool) -> tuple[list[float], list[int]]:
    """Losses, and how many graphs there are after each step; accumulation over two micro-batches."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = training.build_model()
    if how == "before":
        model = torch.compile(model, backend=backend)  # type: ignore[assignment]
    engine = training.xtrain.initialize(
        model=model, model_parameters=training.param_groups(model), config=training.config(stage, bf16=bf16)
    )[0]
    if how == "engine":
        engine.compile(backend=backend)
    assert engine.is_compiled == (how != "")
    assert engine.gradient_accumulation_steps() == 2
    losses, graphs = [], []
    for step in range(STEPS):
        losses.append(training.engine_step(engine, step))
        graphs.append(_graphs())
    assert list(engine.module_state_dict()) == list(training.build_model().state_dict())
    return losses, graphs


def _curves(backend: str, stage: int, bf16: bool) -> list[tuple[list[float], list[int]]]:
    return [_curve(how, backend, stage, bf16) for how in ("", "engine", "before")]


def _compare(curves: Any, tolerance: float) -> None:
    (eager, none), *compiled = curves
    assert none == [0] * STEPS
    for losses, graphs in compiled:
        assert losses == pytest.approx(eager, rel=tolerance)
        assert graphs[0] > 0
        assert graphs[-1] == graphs[0], "compiled again at every step"


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_curve_is_that_of_eager(ranks: Ranks, stage: int, bf16: bool) -> None:
    for curves in ranks(2, _curves, "aot_eager", stage, bf16):
        _compare(curves, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_inductor(ranks: Ranks, stage: int, bf16: bool) -> None:
    for curves in ranks(2, _curves, "inductor", stage, bf16):
        _compare(curves, 0.02 if bf16 else 1e-5)


# ---------------------------------------------------------------- checkpoints


def _model(how: str) -> Any:
    model: Any = toys.LanguageModel("tied")
    if how == "model":
        return torch.compile(model, backend="eager")
    if how == "blocks":
        for number, block in enumerate(model.blocks):
            model.blocks[number] = torch.compile(block, backend="eager")
    return model


def _names_are_plain(folder: Path, stage: int) -> None:
    """What any kind saves, any other kind loads, and goes on as the first."""
    losses: dict[tuple[str, str], list[float]] = {}
    kinds = ("", "model", "blocks")
    for saved in kinds:
        engine = engine_of(_model(saved), stage)
        three_steps(engine)
        weights = engine.module_state_dict()
        assert not [name for name in weights if "_orig_mod" in name]
        assert not [name for name in engine.param_names.values() if "_orig_mod" in name]
        engine.save_checkpoint(str(folder / (saved or "plain")))
        for loaded in kinds if saved == "blocks" else ("blocks",) if saved else ("",):
            torch._dynamo.reset()
            other = engine_of(_model(loaded), stage)
            other.load_checkpoint(str(folder / (saved or "plain")))
            losses[saved, loaded] = three_steps(other)
            other.load_module_state_dict(weights)
            other.load_module_state_dict({f"_orig_mod.{name}": value for name, value in weights.items()})
    assert len({tuple(curve) for curve in losses.values()}) == 1


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_checkpoints_have_plain_names(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    ranks(2, _names_are_plain, tmp_path, stage)


# ---------------------------------------------------------------- the call


def _corners() -> None:
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(len(inputs))
        return graph

    engine = engine_of(toys.LanguageModel("tied"), 1)
    engine.compile(backend=backend, compile_kwargs={"backend": "inductor", "dynamic": False})
    engine.compile(backend="no such backend")  # a second call does nothing
    three_steps(engine)
    assert seen
    compiled = engine_of(torch.compile(toys.LanguageModel("tied"), backend=backend), 1)
    assert compiled.is_compiled
    compiled.compile(backend="no such backend")  # it is already
    compiled(ids_of(0, 0))
    aligned = engine_of(toys.LanguageModel("tied"), 1, xtrain={"aligned": True})
    with pytest.raises(ConfigError, match=r"engine.compile\(\) fuses .* aligned mode"):
        aligned.compile()
    for how in ("model", "blocks"):
        with pytest.raises(ConfigError, match=r"torch.compile\(\) of the model fuses .* aligned mode"):
            engine_of(_model(how), 1, xtrain={"aligned": True})


def test_corners(ranks: Ranks) -> None:
    ranks(2, _corners)
