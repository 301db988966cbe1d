"""The schedules against closed forms, and against the real DeepSpeed where it is installed."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.config.schema import OptimizerConfig, SchedulerConfig
from xtrain.ops.adam import FusedAdam
from xtrain.optim import Adam, Lion, build_optimizer
from xtrain.optim import schedules as schedulers
from xtrain.optim.elementwise import updates_one_by_one
from xtrain.optim.schedules import (
    LRRangeTest,
    OneCycle,
    WarmupCosineLR,
    WarmupDecayLR,
    WarmupLR,
    build_scheduler,
)


def _optimizer(groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 0.5} for _ in range(groups)])


def _rates(scheduler: Any, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step()
    return rates


def test_linear_warmup_and_decay() -> None:
    rates = _rates(WarmupDecayLR(_optimizer(), 20, 0.0, 1.0, 5, "linear"), 25)
    iterations = [-1, *range(24)]
    expected = [0.0 if i < 0 else i / 5 if i < 5 else max(0.0, (20 - i) / 15) for i in iterations]
    assert rates == pytest.approx(expected)


def test_logarithmic_warmup_to_the_groups_own_rate() -> None:
    rates = _rates(WarmupLR(_optimizer(), 0.1, None, 10), 14)
    expected = [0.1] + [0.1 + 0.4 * math.log(i + 1) / math.log(10) if i < 10 else 0.5 for i in range(13)]
    assert rates == pytest.approx(expected)


def test_saved_and_restored() -> None:
    first = WarmupLR(_optimizer(), 0.0, 1.0, 10, "linear")
    before = _rates(first, 6)
    second = WarmupLR(_optimizer(), 0.0, 1.0, 10, "linear")
    second.load_state_dict(first.state_dict())
    assert _rates(second, 4) == _rates(first, 4)
    assert before[-1] < second.get_last_lr()[0]


def test_warmup_and_cosine() -> None:
    rates = _rates(WarmupCosineLR(_optimizer(), 20, 0.2, 5, 0.1, "linear"), 26)
    expected = [0.0]
    for iteration in range(25):
        if iteration < 5:
            ratio = 0.2 + 0.8 * iteration / 5
        else:
            progress = min(1.0, (iteration - 4) / 15)
            ratio = 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2
        expected.append(0.5 * ratio)
    assert rates == pytest.approx(expected)


def test_range_test() -> None:
    even = _rates(LRRangeTest(_optimizer(), 0.1, 4, 2.0), 9)
    assert even == pytest.approx([0.1 * (1 + 2 * i / 4) for i in range(9)])
    stairs = _rates(LRRangeTest(_optimizer(), 0.1, 4, 2.0, True), 9)
    assert stairs == pytest.approx([0.1 * (1 + 2 * (i // 4)) for i in range(9)])


def test_one_cycle_with_momentum() -> None:
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=1.0)
    scheduler = OneCycle(optimizer, 0.1, 0.5, 0.5, 4, 2, decay_step_size=2)
    rates, momenta = [], []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["betas"][0])
        scheduler.step()
    decay = [0.1 / (1 + 0.5 * n / 2) for n in range(1, 5)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, *decay])
    # Momentum starts at its minimum when built and mirrors the rate from the first step on.
    assert momenta == pytest.approx([0.8, 0.875, 0.85, 0.825, 0.8, 0.85, 0.9, 0.9, 0.9, 0.9, 0.9])


CASES: list[tuple[str, dict[str, Any]]] = [
    *[
        (kind, {"warmup_min_lr": 0.01, "warmup_max_lr": 0.3, "warmup_num_steps": 7, "warmup_type": curve, **more})
        for kind, more in (("WarmupLR", {}), ("WarmupDecayLR", {"total_num_steps": 15}))
        for curve in ("log", "linear")
    ],
    ("WarmupCosineLR", {"total_num_steps": 15, "warmup_num_steps": 4, "warmup_min_ratio": 0.1}),
    ("WarmupCosineLR", {"total_num_steps": 3, "warmup_num_steps": 4, "warmup_type": "linear"}),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.1, "lr_range_test_step_size": 3, "lr_range_test_step_rate": 0.5}),
    ("LRRangeTest", {"lr_range_test_step_size": 3, "lr_range_test_staircase": True}),
    ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.9, "cycle_first_step_size": 5}),
    (
        "OneCycle",
        {
            "cycle_min_lr": 0.1, "cycle_max_lr": 0.9, "cycle_first_step_size": 5, "cycle_second_step_size": 7,
            "decay_step_size": 2, "decay_lr_rate": 0.3, "decay_mom_rate": 0.01, "cycle_first_stair_count": 2,
        },
    ),
]  # fmt: skip


@pytest.mark.deepspeed
@pytest.mark.parametrize(("kind", "params"), CASES)
def test_against_deepspeed(kind: str, params: dict[str, Any]) -> None:
    theirs_module = pytest.importorskip("deepspeed.runtime.lr_schedules", reason="needs the extra deepspeed")
    seen = []
    for build in (
        getattr(theirs_module, kind),
        lambda o, **p: build_scheduler(SchedulerConfig(type=kind, params=p), o),
    ):
        optimizer = torch.optim.Adam([torch.zeros(1)], lr=0.4)
        scheduler = build(optimizer, **params)
        rows = []
        for _ in range(20):
            rows.append((optimizer.param_groups[0]["lr"], *optimizer.param_groups[0]["betas"]))
            scheduler.step()
        seen.append(rows)
    for theirs, ours in zip(*seen, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "params", "said"),
    [
        ("WarmupLr", {}, "did you mean 'WarmupLR'"),
        ("WarmupLR", {"warmup_max": 1}, "did you mean 'warmup_max_lr'"),
        ("WarmupLR", {"warmup_type": "lin"}, "unknown schedule 'lin'"),
        ("WarmupLR", {"warmup_num_steps": 0}, "positive integer"),
        ("WarmupLR", {"warmup_max_lr": "1e-3"}, "must be a number"),
        ("WarmupLR", {"warmup_max_lr": True}, "must be a number or a list of numbers"),
        ("WarmupLR", {"warmup_min_lr": float("nan")}, "must be a finite number"),
        ("WarmupLR", {"warmup_num_steps": True}, "must be a whole number"),
        ("WarmupDecayLR", {"total_num_steps": float("inf")}, "must be a finite number"),
        ("WarmupDecayLR", {"total_num_steps": None}, "must be a number"),
        ("LRRangeTest", {"lr_range_test_staircase": "no"}, "must be true or false"),
        ("OneCycle", {"cycle_min_lr": "x", "cycle_max_lr": 1}, "must be a number"),
        ("WarmupLR", {"warmup_max_lr": [1, 2]}, "2 values for 1"),
        ("WarmupDecayLR", {}, "lacks total_num_steps"),
    ],
)
def test_scheduler_mistakes(kind: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_scheduler(SchedulerConfig(type=kind, params=params), _optimizer())


def _minimise(optimizer: torch.optim.Optimizer, param: torch.Tensor, steps: int = 30) -> torch.Tensor:
    target = torch.linspace(-1, 1, param.numel(), dtype=param.dtype)
    for _ in range(steps):
        param.grad = (param.detach() - target) * torch.linspace(0.1, 10, param.numel(), dtype=param.dtype)
        optimizer.step()
    return param.detach()


def test_chunks_change_no_bit() -> None:
    results = []
    for chunk in (None, 7, 16, 1000):
        param = torch.nn.Parameter(torch.ones(50))
        optimizer = Adam([param], lr=0.02, weight_decay=0.1)
        optimizer.chunk_size = chunk
        results.append(_minimise(optimizer, param).clone())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_pytorchs_adam(decoupled: bool) -> None:
    a, b = torch.nn.Parameter(torch.ones(50).double()), torch.nn.Parameter(torch.ones(50).double())
    settings: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours = _minimise(Adam([a], adam_w_mode=decoupled, **settings), a)
    theirs = _minimise((torch.optim.AdamW if decoupled else torch.optim.Adam)([b], **settings), b)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_lion_by_its_paper() -> None:
    param = torch.nn.Parameter(torch.ones(4).double())
    optimizer = Lion([param], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    x, m = torch.ones(4).double(), torch.zeros(4).double()
    for step in range(5):
        grad = torch.tensor([1.0, -2.0, 0.5, 3.0]).double() * (-1) ** step
        param.grad = grad.clone()
        optimizer.step()
        update = torch.sign(0.9 * m + 0.1 * grad)
        x = x - 0.1 * (update + 0.5 * x)
        m = 0.99 * m + 0.01 * grad
        torch.testing.assert_close(param.detach(), x)


def test_deepspeeds_names() -> None:
    from xtrain.ops.adam import DeepSpeedCPUAdam, FusedAdam

    for kind in (FusedAdam, DeepSpeedCPUAdam):
        a, b = torch.nn.Parameter(torch.ones(50)), torch.nn.Parameter(torch.ones(50))
        ours = _minimise(kind([a], lr=0.02, weight_decay=0.1), a)
        torch.testing.assert_close(ours, _minimise(torch.optim.AdamW([b], lr=0.02, weight_decay=0.1), b))
        with pytest.raises(NotImplementedYetError, match="amsgrad"):
            kind([a], amsgrad=True)


def test_deepspeeds_names_for_adagrad_and_lion() -> None:
    from xtrain.ops.adagrad import DeepSpeedCPUAdagrad
    from xtrain.ops.lion import DeepSpeedCPULion, FusedLion

    a, b = torch.nn.Parameter(torch.ones(50).double()), torch.nn.Parameter(torch.ones(50).double())
    ours = _minimise(DeepSpeedCPUAdagrad([a], lr=0.02, weight_decay=0.1), a)
    torch.testing.assert_close(ours, _minimise(torch.optim.Adagrad([b], lr=0.02, weight_decay=0.1), b))
    for kind in (FusedLion, DeepSpeedCPULion):
        assert kind([a]).defaults["betas"] == (0.9, 0.999)
    lion = FusedLion([a], set_grad_none=False)
    lion.zero_grad()
    assert torch.equal(a.grad, torch.zeros(50).double())
    for refused in (
        lambda: DeepSpeedCPUAdagrad([a], amsgrad=True),
        lambda: DeepSpeedCPUAdagrad([a], fp32_optimizer_states=False),
        lambda: DeepSpeedCPULion([a], fp32_optimizer_states=False),
    ):
        with pytest.raises(NotImplementedYetError):
            refused()


def test_any_class_of_torch() -> None:
    assert type(_build("RMSprop", lr=0.1)) is torch.optim.RMSprop
    assert type(_build("Adagrad")) is torch.optim.Adagrad
    assert type(_build("Lion")) is Lion


def _build(kind: str, **params: Any) -> torch.optim.Optimizer:
    return build_optimizer(
        OptimizerConfig(type=kind, params=params), [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    )


def test_adam_type_means_adamw_unless_said_otherwise() -> None:
    assert _build("Adam").defaults["adam_w_mode"] is True
    assert _build("Adam", adam_w_mode=False).defaults["adam_w_mode"] is False
    assert _build("AdamW", adam_w_mode=False).defaults["adam_w_mode"] is True
    assert type(_build("Adam", torch_adam=True)) is torch.optim.AdamW
    assert type(_build("Adam", amsgrad=False)) is Adam
    assert type(_build("Adam", torch_adam=True, adam_w_mode=False)) is torch.optim.Adam


@pytest.mark.parametrize(
    ("kind", "params", "error", "said"),
    [
        ("AdamX", {}, ConfigError, "did you mean"),
        ("Optimizer", {}, ConfigError, "lacks defaults"),
        ("OneBitAdam", {}, NotImplementedYetError, "'OneBitAdam'"),
        ("Lamb", {"max_coef": 1.0}, ConfigError, "did you mean 'max_coeff'"),
        ("Adam", {"bets": [0.9, 0.9]}, ConfigError, "did you mean 'betas'"),
        ("Adam", {"lr": -1.0}, ConfigError, "must not be negative"),
        ("Adam", {"betas": [0.9]}, ConfigError, "two numbers"),
        ("Adam", {"betas": ["0.9", "0.99"]}, ConfigError, "two numbers"),
        ("Adam", {"betas": [True, 0.9]}, ConfigError, "two numbers"),
        (
            "Adam",
            {"lr": "1e-3"},
            ConfigError,
            "lr' is '1e-3': it must be a number, written without quotation",
        ),
        ("Adam", {"lr": None}, ConfigError, "lr' is None: it must be a number"),
        ("Adam", {"lr": [1e-3]}, ConfigError, "it must be a number"),
        ("Adam", {"lr": True}, ConfigError, "lr' is True: it must be a number"),
        ("Adam", {"lr": float("nan")}, ConfigError, "lr' is nan: it must be a finite number"),
        ("Adam", {"lr": float("inf")}, ConfigError, "it must be a finite number"),
        ("Adam", {"eps": 10**400}, ConfigError, "it must be a finite number"),
        ("Adam", {"weight_decay": {}}, ConfigError, "it must be a number"),
        ("Adam", {"adam_w_mode": "no"}, ConfigError, "adam_w_mode' is 'no': it must be true or false"),
        ("AdamW", {"torch_adam": "no"}, ConfigError, "torch_adam' is 'no': it must be true or false"),
        ("AdamW", {"torch_adam": True, "lr": "fast"}, ConfigError, "lr' is 'fast': it must be a number"),
        ("SGD", {"momentum": float("inf")}, ConfigError, "it must be a finite number"),
        ("SGD", {"nesterov": "yes"}, ConfigError, "it must be true or false"),
        ("Muon", {"muon_lr": "x"}, ConfigError, "muon_lr' is 'x': it must be a number"),
        ("Lamb", {"max_coeff": float("nan")}, ConfigError, "it must be a finite number"),
        ("Adam", {"betas": [0.9, 1.5]}, ConfigError, "betas"),
        ("Adam", {"max_grad_norm": 1.0}, ConfigError, "gradient_clipping"),
    ],
)
def test_optimizer_mistakes(kind: str, params: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        _build(kind, **params)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
def test_a_rate_that_is_a_tensor_is_filled_in_place(kind: str, shape: tuple[int, ...]) -> None:
    """Its values are those of a schedule with numbers."""
    options = {
        "WarmupDecayLR": {"total_num_steps": 20},
        "WarmupCosineLR": {"total_num_steps": 20},
        "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_momentum": False},
    }.get(kind, {})

    def build(rate: Any) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
        return optimizer, getattr(schedulers, kind)(optimizer, **options)

    held = torch.full(shape, 0.1, dtype=torch.float64)
    optimizer, schedule = build(held)
    expected, other = build(0.1)
    for _ in range(4):
        assert optimizer.param_groups[0]["lr"] is held
        assert held.item() == pytest.approx(expected.param_groups[0]["lr"])
        schedule.step()
        other.step()


def test_one_cycle_tells_the_betas_of_each_group() -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 2}
    schedule = schedulers.OneCycle(optimizer, **cycle, cycle_min_mom=0.8, cycle_max_mom=0.9)
    assert optimizer.param_groups[0]["betas"] == (
        0.8,
        0.99,
    )  # DeepSpeed's start, which the cycle does not have
    told = []
    for _ in range(3):
        told.append(schedule.get_mom())
        schedule.step()
    assert [pair for ((pair),) in told] == [
        (pytest.approx(0.9), 0.99), (pytest.approx(0.85), 0.99), (pytest.approx(0.8), 0.99)
    ]  # fmt: skip
    assert schedulers.OneCycle(optimizer, **cycle, cycle_momentum=False).get_mom() is None


@pytest.mark.parametrize("kind", ["WarmupDecayLR", "WarmupCosineLR"])
def test_a_warm_up_that_is_longer_than_the_run_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    for warmup, warnings in ((10, 0), (100, 0), (101, 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="xtrain"):
            params = {"total_num_steps": 100.0, "warmup_num_steps": warmup}
            build_scheduler(SchedulerConfig(type=kind, params=params), _optimizer())
        assert len(caplog.records) == warnings
    assert "warms up over 101 steps" in caplog.text
    assert "100 (total_num_steps)" in caplog.text


def test_gradients_are_converted_one_at_a_time() -> None:
    """torch wraps `step` of each class: that must not hide that it is the one that updates parameter by parameter."""

    class Other(Adam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    weight = torch.nn.Parameter(torch.zeros(3))
    assert updates_one_by_one(Adam([weight]))
    assert updates_one_by_one(FusedAdam([weight]))
    assert not updates_one_by_one(Other([weight]))
    assert not updates_one_by_one(torch.optim.Adam([weight]))
    hooked = Adam([weight])
    hooked.register_step_pre_hook(lambda *_: None)
    assert not updates_one_by_one(hooked)


def test_schedules_say_how_they_are_shaped() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cycle = schedulers.OneCycle(optimizer, 0.1, 1.0, cycle_first_step_size=3, cycle_second_step_size=2)
    rates = []
    for _ in range(int(cycle.total_size)):
        cycle.step()
        rates.append(cycle.get_lr()[0])
    rising = sum(later > earlier for earlier, later in zip([0.1, *rates], rates, strict=False))
    assert cycle.total_size == 5
    assert cycle.step_ratio == rising / 5
    for kind in (schedulers.WarmupLR(optimizer), schedulers.WarmupCosineLR(optimizer, 2000)):
        assert kind.warmup_type == "log"
