"""The flops profiler against closed forms, with and without an engine."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import xtrain
from tests import toys, training
from xtrain.base.errors import ConfigError
from xtrain.models.glm import GLM, GLMConfig
from xtrain.profiling.flops_profiler import (
    FlopsProfiler,
    bytes_to_string,
    duration_to_string,
    flops_to_string,
    get_model_profile,
    macs_to_string,
    number_to_string,
    params_to_string,
)

SIZE = st.integers(1, 9)


@settings(max_examples=15, deadline=None)
@given(SIZE, st.lists(SIZE, min_size=2, max_size=5), st.booleans())
def test_linear_layers(batch: int, widths: list[int], bias: bool) -> None:
    model = nn.Sequential(*(nn.Linear(a, b, bias) for a, b in pairwise(widths)))
    found = get_model_profile(model, (batch, widths[0]), print_profile=False, as_string=False)
    macs = batch * sum(a * b for a, b in pairwise(widths))
    params = macs // batch + bias * sum(widths[1:])
    assert found == (2 * macs, macs, params)


@settings(max_examples=10, deadline=None)
@given(SIZE, SIZE, st.integers(4, 9), st.integers(1, 4))
def test_convolutions(channels: int, outputs: int, size: int, kernel: int) -> None:
    model = nn.Conv2d(channels, outputs, kernel)
    flops, _, params = get_model_profile(
        model, (2, channels, size, size), print_profile=False, as_string=False
    )
    assert flops == 2 * 2 * (size - kernel + 1) ** 2 * outputs * channels * kernel**2
    assert params == outputs * channels * kernel**2 + outputs


@settings(max_examples=10, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE)
def test_fused_attention(batch: int, heads: int, length: int, width: int) -> None:
    class Fused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    flops, _, params = get_model_profile(
        Fused(), (batch, heads, length, width), print_profile=False, as_string=False
    )
    assert flops == 2 * 2 * batch * heads * length**2 * width
    assert params == 0


def _glm() -> tuple[GLM, dict[str, torch.Tensor], int, int]:
    """A small GLM, its inputs, and what they cost by the textbook: (flops, parameters)."""
    config = GLMConfig(vocab_size=50, num_layers=3, hidden_size=16, num_heads=2, ffn_size=24)
    batch, length, h, f = 2, 10, 16, 24
    inputs = {
        "input_ids": torch.zeros(batch, length, dtype=torch.long),
        "position_ids": torch.zeros(batch, 2, length, dtype=torch.long),
        "context_lengths": torch.full((batch,), 5),
        "labels": torch.zeros(batch, length, dtype=torch.long),
    }
    tokens = batch * length
    per_layer = 2 * tokens * (3 * h * h + h * h + 2 * h * f + f * h) + 2 * 2 * batch * length**2 * h
    weights = 4 * h * h + 3 * h * f + (3 * h + h + 2 * f + h) + 4 * h
    return GLM(config), inputs, 3 * per_layer + 2 * tokens * h * 50, 3 * weights + 50 * h


def test_a_transformer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, inputs, flops, params = _glm()
    assert get_model_profile(model, kwargs=inputs, as_string=False, top_modules=2) == (
        flops,
        flops // 2,
        params,
    )
    assert model.training
    out = capsys.readouterr().out
    assert f"params: {'':<62}{params_to_string(params)}\n" in out
    assert "(mlp) GeGLU: " in out
    assert "= 100.00% params" in out
    path = tmp_path / "new" / "profile.txt"
    words = get_model_profile(model, kwargs=inputs, detailed=False, output_file=str(path), module_depth=1)
    assert words == (number_to_string(flops), macs_to_string(flops // 2), params_to_string(params))
    text = path.read_text()
    assert "depth 1:" in text
    assert "depth 2:" not in text
    assert "GeGLU" not in text
    assert capsys.readouterr().out == ""


def test_modules_add_up() -> None:
    model, inputs, _, _ = _glm()
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_list=[nn.LayerNorm])
    loss = model(**inputs)
    loss.backward()  # is not counted: only forward passes are
    profiler.end_profile()
    layers = [profiler.cost(layer) for layer in model.layers]
    assert profiler.cost(model.layers).flops == sum(layer.flops for layer in layers)
    assert profiler.get_total_flops() - profiler.cost(model.layers).flops == 2 * 20 * 16 * 50  # logits
    assert not profiler.cost(model.layers[0].mlp_norm).called
    assert 0 < sum(layer.seconds for layer in layers) < profiler.get_total_duration()
    assert profiler.get_total_duration(as_string=True).endswith("s")
    model(**inputs)  # nothing is left behind
    assert [profiler.cost(layer).flops for layer in model.layers] == [layer.flops for layer in layers]


def test_calls_of_one_module_add_up() -> None:
    assert get_model_profile(toys.Repeated(), (2, 4), print_profile=False, as_string=False) == (192, 96, 20)
    twice = get_model_profile(
        toys.Repeated(), args=[torch.ones(2, 4)], mode="generate", print_profile=False, as_string=False
    )
    assert twice == (384, 192, 20)


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="needs input_shape, args or kwargs"):
        get_model_profile(toys.Repeated())
    with pytest.raises(ConfigError, match="use 'forward' or 'generate'"):
        get_model_profile(toys.Repeated(), (2, 4), mode="backward")
    with pytest.raises(ConfigError, match="no figures yet"):
        FlopsProfiler(toys.Repeated()).print_model_profile()


@pytest.mark.deepspeed
@settings(deadline=None)  # the first example imports DeepSpeed
@given(st.floats(0, 1e15), st.sampled_from([None, "T", "G", "M", "K", "", "m", "u"]), st.integers(0, 4))
def test_numbers_are_written_as_deepspeed_does(number: float, units: str | None, precision: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        theirs = pytest.importorskip(
            "deepspeed.profiling.flops_profiler.profiler", reason="needs the extra deepspeed"
        )
    for ours in (number_to_string, flops_to_string, macs_to_string, bytes_to_string, params_to_string,
                 duration_to_string):  # fmt: skip
        assert ours(number, units, precision) == getattr(theirs, ours.__name__)(number, units, precision)


@pytest.mark.deepspeed
def test_deepspeed_counts_the_same_matrix_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    theirs = pytest.importorskip(
        "deepspeed.profiling.flops_profiler.profiler", reason="needs the extra deepspeed"
    )
    model, inputs, _, _ = _glm()
    expected = theirs.get_model_profile(model, kwargs=inputs, print_profile=False, as_string=False)
    found = get_model_profile(model, kwargs=inputs, print_profile=False, as_string=False)
    assert found[1:] == expected[1:]  # multiply-accumulates and parameters
    assert found[0] <= expected[0]  # DeepSpeed adds operations element by element


def _engine(stage: int, section: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    model, out = training.build_model(), io.StringIO()
    config = training.config(
        stage, 4, zero_optimization=training.zero(stage, 0), flops_profiler=section, **more
    )
    engine = xtrain.initialize(model=model, config=config)[0]
    with redirect_stdout(out):
        losses = [training.engine_step(engine, step) for step in range(4)]
    figures = {}
    if section.get("enabled") and engine.global_rank == 0:
        profiler = engine.flops_profiler
        figures = {
            name: (profiler.cost(module).flops, profiler.cost(module).params)
            for name, module in model.named_modules()
        }
    return {"losses": losses, "figures": figures, "out": out.getvalue()}


@pytest.mark.parametrize("more", [{}, {"xtrain": {"aligned": True}}, {"wall_clock_breakdown": True}])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_profile_of_training(ranks: Any, tmp_path: Path, stage: int, more: dict[str, Any]) -> None:
    path = tmp_path / "profile.txt"
    section = {"enabled": True, "profile_step": 2, "output_file": str(path), "recompute_fwd_factor": 1.0}
    plain, _ = ranks(2, _engine, stage, {}, more)
    first, second = ranks(2, _engine, stage, section, more)
    assert first["losses"] == second["losses"] == plain["losses"]
    macs = (4 * 7 * 33, 4 * 33 * 5)
    assert first["figures"] == {
        "": (2 * sum(macs), 7 * 33 + 33 + 33 * 5 + 5),
        "first": (2 * macs[0], 7 * 33 + 33),
        "second": (2 * macs[1], 33 * 5 + 5),
    }
    text = path.read_text()
    assert "Profile of step 2\n" in text
    assert f"fwd flops per GPU: {'':<51}{number_to_string(2 * sum(macs))}\n" in text
    assert ("FLOPS per GPU = accumulation steps * 4 * fwd flops / iter latency" in text) is (
        "wall_clock_breakdown" in more
    )
    assert "TwoLayers: 434 = 100.00% params" in text


def test_a_profile_is_printed_once(ranks: Any) -> None:
    first, second = ranks(2, _engine, 1, {"enabled": True, "detailed": False}, {})
    assert first["out"].count("Profile of step 1") == 1
    assert "Detailed" not in first["out"]
    assert second["out"] == ""


def _failing(compiled: bool) -> tuple[int, float]:
    class Failing(toys.Repeated):
        """Raises when told to."""

        def forward(self, x: torch.Tensor, fail: bool = False) -> torch.Tensor:
            if fail:
                self.layer(x)
                raise RuntimeError("failed")
            return super().forward(x).sum()

    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "flops_profiler": {"enabled": True, "profile_step": 0, "detailed": False},
    }
    engine = xtrain.initialize(model=Failing(), config=config)[0]
    if compiled:
        engine.compile(backend="eager")
    with pytest.raises(RuntimeError, match="failed"):
        engine(torch.ones(2, 4), fail=True)
    with redirect_stdout(io.StringIO()):
        for _ in range(2):
            engine.backward(engine(torch.ones(2, 4)))
            engine.step()
    return engine.flops_profiler.get_total_flops(), engine.flops_profiler.get_total_duration()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_forward_that_fails_is_not_the_profiled_one(ranks: Any, compiled: bool) -> None:
    flops, seconds = ranks(1, _failing, compiled)[0]
    assert flops == 192
    assert seconds > 0


def test_the_printed_totals_stay_when_the_counters_are_reset(capsys: pytest.CaptureFixture[str]) -> None:
    """A linear layer of 3 x 5 on 2 samples: 2 x 15 multiplications and additions."""
    model = torch.nn.Linear(3, 5, bias=False)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.ones(2, 3))
    profiler.print_model_profile(detailed=False)
    profiler.end_profile()
    assert (profiler.flops, profiler.macs, profiler.params) == (60, 30, 15)
