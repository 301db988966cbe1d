"""Loss scaling against the real DeepSpeed's scaler, and against the rules written out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xtrain.base.errors import ConfigError, TrainingError
from xtrain.config.schema import Config, Fp16Config, TorchAutocastConfig
from xtrain.precision import DynamicLossScale, make_loss_scale, make_policy


def test_the_rules() -> None:
    scale = DynamicLossScale(initial=8.0, window=2, hysteresis=2, consecutive=False, minimum=1.0)
    seen = []
    for overflow in (True, True, True, False, False, False, True, True):
        scale.update(overflow)
        seen.append(scale.value)
    # borne; halved; halved; good; good; doubled and refilled; borne; halved
    assert seen == [8, 4, 2, 2, 2, 4, 4, 2]


def test_overflow_at_the_minimum_is_an_error() -> None:
    scale = DynamicLossScale(initial=2.0, window=2, hysteresis=1, consecutive=False, minimum=1.0)
    scale.update(True)
    with pytest.raises(TrainingError, match="smallest loss scale"):
        scale.update(True)


@pytest.mark.parametrize(("stage", "seen"), [(0, [8, 4, 2, 1, 1]), (1, [16, 8, 4, 2, 1])])
def test_stage_0_has_no_hysteresis_and_no_end(stage: int, seen: list[float]) -> None:
    """Read from deepspeed 0.19.8: its FP16_Optimizer halves at once, and stays at the smallest scale."""
    scale = make_loss_scale(Fp16Config(enabled=True, initial_scale_power=4), stage=stage)
    found = []
    for _ in range(5):
        scale.update(True)
        found.append(scale.value)
    assert found == seen


def test_autocast_scales_as_torch_does() -> None:
    autocast = TorchAutocastConfig(enabled=True, dtype="fp16")
    ours = make_loss_scale(Fp16Config(), autocast)
    theirs = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(4010):
        bad = step == 2003
        weight.grad = torch.full((1,), float("inf") if bad else 1.0)
        theirs.scale(torch.ones(1))
        theirs.step(optimizer)
        theirs.update()
        ours.update(bad)
        assert ours.value == theirs.get_scale()
    assert ours.value == 2.0**17  # doubled, halved, doubled


def test_what_the_config_asks_for() -> None:
    assert make_loss_scale(Fp16Config()).value == 1.0
    assert make_loss_scale(Fp16Config(enabled=True, loss_scale=128)).value == 128
    assert not make_loss_scale(Fp16Config(enabled=True, loss_scale=128)).dynamic
    assert make_loss_scale(Fp16Config(enabled=True)).value == 2.0**16
    with pytest.raises(ConfigError, match="both true"):
        make_policy(Config.model_validate({"fp16": {"enabled": True}, "bf16": {"enabled": True}}))


@given(
    st.lists(st.booleans(), max_size=40),
    st.integers(1, 5),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 40),
)
def test_state_is_all_there_is(
    overflows: list[bool], window: int, hysteresis: int, consecutive: bool, cut: int
) -> None:
    def fresh() -> DynamicLossScale:
        return DynamicLossScale(2.0**50, window, hysteresis, consecutive, 2.0**-50)

    whole, resumed = fresh(), fresh()
    for overflow in overflows[:cut]:
        whole.update(overflow)
    resumed.load_state_dict(whole.state_dict())
    for overflow in overflows[cut:]:
        whole.update(overflow)
        resumed.update(overflow)
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.deepspeed
@given(
    overflows=st.lists(st.booleans(), max_size=60),
    window=st.integers(1, 6),
    hysteresis=st.integers(1, 4),
    consecutive=st.booleans(),
)
def test_against_deepspeed(overflows: list[bool], window: int, hysteresis: int, consecutive: bool) -> None:
    theirs_module = pytest.importorskip(
        "deepspeed.runtime.fp16.loss_scaler", reason="needs the extra deepspeed"
    )
    theirs_module.dist = SimpleNamespace(get_rank=lambda: 1)  # it logs on rank 0 only
    theirs = theirs_module.DynamicLossScaler(
        init_scale=2.0**20,
        scale_window=window,
        min_scale=2.0**-60,
        delayed_shift=hysteresis,
        consecutive_hysteresis=consecutive,
        raise_error_at_min_scale=False,
    )
    ours = DynamicLossScale(2.0**20, window, hysteresis, consecutive, 2.0**-60)
    for overflow in overflows:
        theirs.update_scale(overflow)
        ours.update(overflow)
        assert ours.value == theirs.cur_scale
