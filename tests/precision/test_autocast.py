"""torch_autocast and the script's own autocast regions, against plain PyTorch."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from xtrain.base.errors import ConfigError
from xtrain.precision import autocast

STEPS = 6


def _model(own: bool) -> nn.Module:
    class OwnRegion(toys.TwoLayers):
        """Autocast in the first layer only, as models do it themselves."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = torch.tanh(self.first(x))
            assert hidden.dtype == torch.bfloat16
            return self.second(hidden.float())

    torch.manual_seed(0)
    return OwnRegion() if own else toys.TwoLayers()


def _train(stage: int, own: bool, section: dict[str, Any]) -> tuple[list[float], torch.dtype, torch.dtype]:
    settings = training.config(stage, micro=4, torch_autocast=section)
    result = training.train(settings, STEPS, _model(own))
    engine = xtrain.initialize(model=_model(own), config=settings)[0]
    return (
        [result["losses"], result["rates"]],  # type: ignore[return-value]
        engine(torch.ones(1, toys.FEATURES)).dtype,
        engine.module.first.weight.dtype,
    )


def _reference(rates: list[float], own: bool, dtype: torch.dtype) -> list[float]:
    model = _model(own)
    optimizer = torch.optim.AdamW(training.param_groups(model), lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = (t.float() for t in training.samples(step))
        with torch.autocast("cpu", dtype, enabled=not own):
            out = model(x)
        loss = (out.float() - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("kind", ["bfloat16", "fp16", "own region"])
def test_curves_are_pytorchs(ranks: Any, stage: int, kind: str) -> None:
    own = kind == "own region"
    section = {"enabled": False} if own else {"enabled": True, "dtype": kind}
    for (losses, rates), out, weights in ranks(2, _train, stage, own, section):
        dtype = torch.float16 if kind == "fp16" else torch.bfloat16
        expected = _reference(rates, own, dtype)
        assert losses == pytest.approx(expected, rel=2e-3)
        plain = training.reference(rates)["losses"]
        assert losses[0] != pytest.approx(plain[0], rel=1e-6)  # it was not float32
        assert (out, weights) == (torch.float32 if own else dtype, torch.float32)


def _overflow() -> tuple[list[float], list[bool]]:
    section = {"enabled": True, "dtype": "fp16"}
    engine = xtrain.initialize(
        model=training.build_model(), config=training.config(1, micro=8, torch_autocast=section)
    )[0]
    scales, applied = [engine.loss_scale()], []
    for step in range(3):
        x, y = (t[:8] for t in training.samples(step))
        factor = 1e4 if step == 1 and xtrain.comm.get_rank() == 1 else 1.0
        out = engine(x.float())
        engine.backward((out.float() - y.float()).square().mean() * factor)
        engine.step()
        scales.append(engine.loss_scale())
        applied.append(engine.was_step_applied())
    return scales, applied


def test_fp16_is_scaled_as_by_gradscaler(ranks: Any) -> None:
    for scales, applied in ranks(2, _overflow):
        assert scales == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
        assert applied == [True, False, True]


def _around(enabled: bool) -> tuple[torch.dtype, list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    autocast._told.clear()
    section = {"enabled": enabled, "dtype": "bf16"}
    engine = xtrain.initialize(
        model=training.build_model(), config=training.config(0, torch_autocast=section)
    )[0]
    logger = logging.getLogger("xtrain")
    logger.addHandler(handler)
    try:
        with torch.autocast("cpu", torch.float16):
            dtypes = {engine(torch.ones(1, toys.FEATURES)).dtype for _ in range(3)}
    finally:
        logger.removeHandler(handler)
    (dtype,) = dtypes
    return dtype, lines


def test_a_region_around_the_engine_gives_way_to_the_config(ranks: Any) -> None:
    dtype, lines = ranks(1, _around, True)[0]
    assert dtype == torch.bfloat16
    assert len(lines) == 1
    dtype, lines = ranks(1, _around, False)[0]
    assert dtype == torch.float32
    assert len(lines) == 1
    assert "torch_autocast" in lines[0]


def test_a_wide_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"torch_autocast\.dtype"):
        xtrain.config.load_config(
            {**training.config(0), "torch_autocast": {"enabled": True, "dtype": "fp32"}}
        )
