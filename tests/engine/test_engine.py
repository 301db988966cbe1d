"""The engine against a plain PyTorch loop in float64, over ranks, stages and dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from xtrain.base.errors import ConfigError, XtrainError
from xtrain.optim.schedules import WarmupDecayLR


@pytest.mark.parametrize(("ranks_", "micro"), [(1, 16), (1, 4), (2, 4), (4, 4), (4, 1)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_matches_float64_pytorch(ranks: Any, ranks_: int, micro: int, stage: int) -> None:
    results = ranks(ranks_, training.train, training.config(stage, micro))
    expected = training.reference(results[0]["rates"])
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_with_fp32_masters_stays_near_float64(ranks: Any, stage: int) -> None:
    """Plain bf16 weights would stall: updates of lr 0.01 x warm-up are below half an ulp of many weights."""
    result = ranks(2, training.train, training.config(stage, bf16=True), 12)[0]
    expected = training.reference(result["rates"])
    assert result["losses"] == pytest.approx(expected["losses"], rel=2e-2)


@pytest.mark.bits
@pytest.mark.parametrize("ranks_", [2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_stages_give_the_same_bits(ranks: Any, dtype: str, ranks_: int) -> None:
    more = {"fp16": {"enabled": True, "initial_scale_power": 8}} if dtype == "fp16" else {}
    results = [
        ranks(ranks_, training.train, training.config(stage, 16 // ranks_, bf16=dtype == "bf16", **more))[0]
        for stage in (0, 1, 2, 3)
    ]
    for result in results[1:]:
        assert result["losses"] == results[0]["losses"]
        assert all(torch.equal(result["weights"][n], w) for n, w in results[0]["weights"].items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_with_loss_scaling_stays_near_float64(ranks: Any, stage: int) -> None:
    settings = training.config(stage, fp16={"enabled": True, "initial_scale_power": 10})
    result = ranks(2, training.train, settings, 12)[0]
    expected = training.reference(result["rates"])
    assert result["losses"] == pytest.approx(expected["losses"], rel=5e-3)
    assert result["norms"] == pytest.approx(expected["norms"], rel=2e-2)


def _variants() -> dict[str, list[float]]:
    variants = {
        "plain": training.config(1),
        "sent in bf16": training.config(1, communication_data_type="bf16"),
        "sent in bf16, stage 0": training.config(0, communication_data_type="bf16"),
        "sent in bf16, stage 2": training.config(2, communication_data_type="bf16"),
        "prescaled": training.config(1, prescale_gradients=True),
        "predivided": training.config(2, gradient_predivide_factor=4.0),
    }
    return {name: training.train(settings)["losses"] for name, settings in variants.items()}


def test_ways_of_averaging_agree(ranks: Any) -> None:
    curves = ranks(2, _variants)[0]
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["plain"], rel=1e-2 if "bf16" in name else 1e-6), name
    assert curves["sent in bf16"] != curves["plain"]  # it did travel in bf16
    assert curves["prescaled"] == curves["plain"]  # a power of two rounds nothing


def _own_backward(stage: int, dtype: str) -> tuple[list[float], list[float]]:
    """The script's own loss.backward() and engine.backward() give the same curve."""
    curves = []
    for own in (True, False):
        model = training.build_model()
        settings = training.config(
            stage, micro=4, fp16={"enabled": dtype == "fp16", "initial_scale_power": 8}
        )
        engine, _, _, _ = xtrain.initialize(model=model, config=settings)
        losses = []
        for step in range(5):
            x, y = training.samples(step)
            for index in range(engine.gradient_accumulation_steps()):
                first = (engine.grid.rank * engine.gradient_accumulation_steps() + index) * 4
                loss = training.loss_of(engine, x[first : first + 4], y[first : first + 4])
                if own:
                    engine.scale(loss).backward()
                else:
                    engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        curves.append(losses)
    return curves[0], curves[1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_scripts_own_backward(ranks: Any, stage: int, dtype: str) -> None:
    own, through_engine = ranks(2, _own_backward, stage, dtype)[0]
    assert own == through_engine


def _fp16_overflow(stage: int) -> tuple[list[float], int, list[bool]]:
    model = training.build_model()
    scaling = {"enabled": True, "initial_scale_power": 15, "hysteresis": 1, "loss_scale_window": 3}
    engine, _, _, _ = xtrain.initialize(model=model, config=training.config(stage, micro=8, fp16=scaling))
    scales, applied = [], []
    for step in range(10):
        x, y = (t[:8] for t in training.samples(step))
        # On rank 1 alone the loss is large enough to overflow in fp16 at the first scales.
        factor = 16.0 if xtrain.comm.get_rank() == 1 else 1.0
        engine.backward(training.loss_of(engine, x, y) * factor)
        engine.step()
        scales.append(engine.loss_scale())
        applied.append(engine.was_step_applied())
    return scales, engine.skipped_steps, applied


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_overflow_on_one_rank_halves_the_scale_on_all(ranks: Any, stage: int) -> None:
    first, second = ranks(2, _fp16_overflow, stage)
    assert first == second
    scales, skipped, applied = first
    assert skipped == applied.count(False) > 0
    assert scales[0] == 2.0**14
    assert any(applied)
    assert min(scales) < 2.0**14


def _overlap_and_accumulation_dtype() -> list[list[float]]:
    plain = training.train(training.config(1))["losses"]
    no_overlap = training.config(1)
    no_overlap["zero_optimization"]["overlap_comm"] = False
    wide = training.config(1, bf16=True, data_types={"grad_accum_dtype": "fp32"})
    return [plain, training.train(no_overlap)["losses"], training.train(wide)["losses"]]


@pytest.mark.bits
def test_overlap_changes_nothing_and_fp32_accumulation_works(ranks: Any) -> None:
    plain, no_overlap, wide = ranks(2, _overlap_and_accumulation_dtype)[0]
    assert plain == no_overlap
    assert wide == pytest.approx(plain, rel=2e-2)


def _fp32_accumulation_error() -> tuple[float, float]:
    """Distance of the accumulated gradient from float64, in bf16 and in fp32 accumulation."""
    errors = []
    for dtype in ("bf16", "fp32"):
        model = nn.Linear(64, 64, bias=False)
        exact = torch.zeros(64, 64, dtype=torch.float64)
        engine, _, _, _ = xtrain.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 64,
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": dtype},
                "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
            },
        )
        for index in range(63):
            x = torch.randn(1, 64, generator=torch.Generator().manual_seed(index)).bfloat16().abs()
            engine.backward(engine(x).float().sum())
            engine.step()
            exact += x.double().expand(64, 64) / 64
        gradients = engine.optimizer.gradients[0]
        errors.append(float((gradients.view(0).double() - exact).abs().max()))
    return errors[0], errors[1]


def test_fp32_accumulation_is_more_exact_than_bf16(ranks: Any) -> None:
    bf16_error, fp32_error = ranks(1, _fp32_accumulation_error)[0]
    assert fp32_error < 1e-3 < bf16_error


def _train_odd(stage: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model = toys.Odd()
    if xtrain.comm.get_rank() == 1:  # rank 0's values must win
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data.copy_(tensor.data == 0)
    engine, _, _, _ = xtrain.initialize(model=model, config=training.config(stage, micro=4))
    losses = [training.engine_step(engine, step) for step in range(6)]
    return losses, {name: value.clone() for name, value in engine.module.state_dict().items()}


def test_tied_unused_frozen_and_empty_parameters(ranks: Any) -> None:
    torch.manual_seed(1)
    model = toys.Odd()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0
    )
    scheduler = WarmupDecayLR(optimizer, 40, 0.0, 0.01, 4)
    optimizer.param_groups[0]["betas"] = (0.9, 0.95)
    expected = []
    for step in range(6):
        loss = training.loss_of(model, *training.samples(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
        scheduler.step()
        expected.append(loss.item())
    for stage in (0, 1, 2, 3):
        (losses, state), (_, other) = ranks(2, _train_odd, stage)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert torch.equal(state["a.weight"], state["b.weight"])
        assert torch.equal(state["frozen"], start["frozen"])
        assert torch.equal(state["unused"], start["unused"])  # no decay, no gradient


def _client_optimizer(kind: str) -> list[float]:
    model = training.build_model()
    if kind == "object":
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    else:
        optimizer = lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9)  # noqa: E731
        scheduler = lambda opt: torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)  # noqa: E731
    settings = training.config(1)
    del settings["optimizer"], settings["scheduler"]
    engine, wrapped, _, returned = xtrain.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler, config=settings
    )
    assert wrapped.param_groups is engine.basic_optimizer.param_groups
    assert returned is engine.lr_scheduler
    return [training.engine_step(engine, step) for step in range(6)] + engine.get_lr()


@pytest.mark.parametrize("kind", ["object", "callable"])
def test_a_users_optimizer_and_scheduler(ranks: Any, kind: str) -> None:
    result = ranks(2, _client_optimizer, kind)[0]
    model = training.build_model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 ** (step // 2)
        loss = training.loss_of(model, *training.samples(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        assert result[step] == pytest.approx(loss.item(), rel=1e-5)
    assert result[6] == pytest.approx(0.05 / 8)


def _ledger_bytes(stage: int) -> tuple[int, int]:
    settings = training.config(stage, micro=8, zero_optimization=training.zero(stage, 0))
    model = training.build_model()
    engine, _, _, _ = xtrain.initialize(model=model, model_parameters=model.parameters(), config=settings)
    training.engine_step(engine, 0)  # the first step also compares what arrived late: a few bytes
    xtrain.comm.ledger.reset()
    training.engine_step(engine, 1)
    ledger = xtrain.comm.ledger
    order = [entry for (name, _), entry in ledger.entries.items() if name == "roll_call"]
    gathers = [entry.calls for (name, _), entry in ledger.entries.items() if name == "all_gather"]
    if stage == 3:  # a number of eight bytes beside each gather, and one at the end of the backward
        assert [entry.calls for entry in order] == [gathers[0] + 1]
    numbers = ledger.sent_bytes("roll_call")
    assert numbers == sum(8 * entry.calls for entry in order)
    sent = ledger.sent_bytes() - numbers
    elements = sum(group.layout.total for group in engine.optimizer.groups)
    small = 8 if stage == 0 else 16  # the test's loss, and the norm in stage 1: one float64 each
    return int(sent) - small, elements


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_on_the_wire_follow_the_formula(ranks: Any, stage: int) -> None:
    """Elements sent per rank: 2 (N-1)/N for each parameter, 3 (N-1)/N in stage 3."""
    for sent, elements in ranks(2, _ledger_bytes, stage):
        assert sent == (3 if stage == 3 else 2) * elements * 4 * (2 - 1) / 2


def _optimizer_state_elements(stage: int, bf16: bool) -> tuple[int, int, int]:
    model = nn.Linear(512, 512)
    engine, _, _, _ = xtrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": bf16},
            "zero_optimization": training.zero(stage, 0),
            "optimizer": {"type": "Adam"},
        },
    )
    engine.backward(engine(torch.ones(1, 512, dtype=model.weight.dtype)).float().square().mean())
    engine.step()
    storages = {}
    held = [getattr(item, name) for item in engine.optimizer.gradients for name in vars(item)]
    tensors = [t for t in held if torch.is_tensor(t)]
    tensors += [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [master for group in engine.optimizer.groups for master in group.masters]
    tensors += [group.shard for group in engine.partition.sharded]
    for state in engine.optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()), 512 * 513, engine.world_size


@pytest.mark.parametrize("ranks_", [1, 2, 4])
def test_memory_of_states_follows_the_formula(ranks: Any, ranks_: int) -> None:
    """bf16, bytes a parameter: 16; 4 + 12/N in stage 1; 2 + 14/N in stage 2; 16/N in stage 3."""
    for stage, whole in ((0, 16), (1, 4), (2, 2), (3, 0)):
        for used, parameters, n in ranks(ranks_, _optimizer_state_elements, stage, True):
            expected = parameters * (whole + (16 - whole) / n)
            assert used == pytest.approx(expected, rel=0.01)


def _skip_on_infinity() -> tuple[int, bool, bool, list[float]]:
    model = training.build_model()
    engine, _, _, _ = xtrain.initialize(model=model, config=training.config(1, bf16=True))
    before = [p.detach().clone() for p in model.parameters()]
    loss = training.loss_of(engine, *[t[:4] for t in training.samples(0)])
    for _ in range(engine.gradient_accumulation_steps()):
        # Only rank 1 overflows; all ranks must skip.
        factor = float("inf") if xtrain.comm.get_rank() == 1 else 1.0
        engine.backward(training.loss_of(engine, *[t[:4] for t in training.samples(0)]) * factor)
        engine.step()
    del loss
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return engine.skipped_steps, engine.was_step_applied(), same, engine.get_lr()


def test_bf16_overflow_skips_on_all_ranks(ranks: Any) -> None:
    for skipped, applied, same, lr in ranks(2, _skip_on_infinity):
        assert (skipped, applied, same) == (1, False, True)
        assert lr == [0.0]  # the schedule did not advance


def _no_sync_in_stage_2() -> str:
    engine, _, _, _ = xtrain.initialize(model=training.build_model(), config=training.config(2))
    with pytest.raises(ConfigError) as caught, engine.no_sync():
        pass
    return str(caught.value)


def test_no_sync_is_refused_in_stage_2(ranks: Any) -> None:
    assert "stage 2" in ranks(2, _no_sync_in_stage_2)[0]


def _no_sync_and_errors() -> list[str]:
    model = training.build_model()
    engine, _, _, _ = xtrain.initialize(model=model, config=training.config(1, micro=8))
    x, y = (t[:8] for t in training.samples(0))
    messages = []
    with engine.no_sync():
        engine.backward(training.loss_of(engine, x, y))
        for action in (engine.step,):
            with pytest.raises(ConfigError) as caught:
                action()
            messages.append(str(caught.value))
    engine.backward(training.loss_of(engine, x, y))
    with pytest.raises(ConfigError) as caught:
        training.loss_of(engine, x, y).backward()  # what has been reduced is not to be mixed with it
    messages.append(str(caught.value))
    return messages


def test_no_sync_allows_a_second_backward_and_mistakes_are_named(ranks: Any) -> None:
    inside, twice = ranks(2, _no_sync_and_errors)[0]
    assert "no_sync" in inside
    assert "'second.bias'" in twice or "'second.weight'" in twice
    assert "no_sync" in twice


def _disagree(what: str) -> str:
    rank = xtrain.comm.get_rank()
    model = nn.Linear(4, 4 + (rank if what == "shape" else 0))
    if what == "count" and rank == 1:
        model.extra = nn.Linear(1, 1)
    settings = training.config(1, gradient_clipping=1.0 + (rank if what == "config" else 0))
    with pytest.raises(ConfigError) as caught:
        xtrain.initialize(model=model, config=settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "said"), [("shape", "weight (5, 4)"), ("count", "4"), ("config", "gradient_clipping")]
)
def test_ranks_that_disagree_get_the_same_error(ranks: Any, what: str, said: str) -> None:
    messages = ranks(2, _disagree, what)
    assert messages[0] == messages[1]
    assert said in messages[0]


def _single(case: str) -> str:
    model = training.build_model()
    settings: dict[str, Any] = training.config(1)
    kwargs: dict[str, Any] = {}
    if case == "no config":
        settings = None  # type: ignore[assignment]
    elif case == "float8":
        model.first.weight.data = model.first.weight.data.to(torch.float8_e4m3fn)
    elif case == "frozen":
        model.requires_grad_(False)
    elif case == "stepped optimizer":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(1, 7)).sum().backward()
        optimizer.step()
        kwargs["optimizer"] = optimizer
    elif case == "unknown optimizer":
        kwargs["optimizer"] = torch.optim.LBFGS(model.parameters())
    elif case == "mesh":
        kwargs["mesh_param"] = (1, 1)
    elif case == "backend":
        settings["xtrain"] = {"backend": "cpuu"}
    elif case == "fake settings":
        settings["xtrain"] = {"backend": "cpu", "fake": {"profile": "a100-tf32"}}

    def use() -> None:
        engine, _, _, _ = xtrain.initialize(model=model, config=settings, **kwargs)
        if case == "step without backward":
            engine.step()
        if case == "vector loss":
            engine.backward(torch.ones(3, requires_grad=True))

    with pytest.raises(XtrainError) as caught:
        use()
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no config", "no config was given"),
        ("float8", "'first.weight' is float8_e4m3fn"),
        ("frozen", "nothing to train"),
        ("stepped optimizer", "taken steps already"),
        ("unknown optimizer", "LBFGS"),
        ("mesh", "mesh_param"),
        ("backend", "did you mean 'cpu'"),
        ("fake settings", "'xtrain.fake' is for backend 'fake'"),
        ("step without backward", "no gradient has arrived"),
        ("vector loss", "scalar loss"),
    ],
)
def test_mistakes_are_one_sentence(ranks: Any, case: str, said: str) -> None:
    message = ranks(1, _single, case)[0]
    assert said in message
    assert "\n" not in message


def _batch_sizes_at_run_time() -> list[tuple[int, int, int]]:
    model = training.build_model()
    engine, _, _, _ = xtrain.initialize(model=model, config=training.config(1, micro=4))
    seen = [engine.get_batch_info()]
    engine.set_train_batch_size(32)
    seen.append(engine.get_batch_info())
    return seen


def test_the_batch_can_grow_at_run_time(ranks: Any) -> None:
    assert ranks(2, _batch_sizes_at_run_time)[0] == [(16, 4, 2), (32, 4, 4)]


def _two_engines_and_attributes() -> tuple[bool, str]:
    first, second = training.build_model(), training.build_model()
    a, _, _, _ = xtrain.initialize(model=first, config=training.config(0))
    b, _, _, _ = xtrain.initialize(model=second, config=training.config(1))
    same = all(training.engine_step(a, step) == training.engine_step(b, step) for step in range(4))
    first.custom = "reached through the engine"
    return same, a.custom


def test_two_engines_in_one_process(ranks: Any) -> None:
    assert ranks(2, _two_engines_and_attributes)[0] == (True, "reached through the engine")


def _loader() -> list[int]:
    data = [(torch.full((7,), float(i)), i) for i in range(32)]
    engine, _, loader, _ = xtrain.initialize(
        model=training.build_model(), training_data=data, config=training.config(0, micro=4)
    )
    assert isinstance(engine, xtrain.DeepSpeedEngine)
    return [int(i) for _, labels in loader for i in labels]


def test_training_data_is_divided_between_ranks(ranks: Any) -> None:
    first, second = ranks(2, _loader)
    assert len(first) == len(second) == 16
    assert sorted(first + second) == list(range(32))
