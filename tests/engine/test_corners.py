"""What scripts do around the training step: discard, clip, share, crash, checkpoint re-entrantly."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from tests import toys, training
from xtrain.align import run_recording as managed
from xtrain.base.errors import ConfigError, NotImplementedYetError, RunInterrupted
from xtrain.base.log import logger

SGD = {"type": "SGD", "params": {"lr": 1.0}}


def _engine(model: nn.Module, stage: int = 1, accumulation: int = 1, **more: Any) -> Any:
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0,
        "zero_optimization": training.zero(stage, 0),
        "optimizer": SGD,
        **more,
    }
    return xtrain.initialize(model=model, model_parameters=model.parameters(), config=settings)[0]


def _weight(engine: Any) -> torch.Tensor:
    return engine.module_state_dict()["weight"].clone()


def _default_clipping(stage: int) -> tuple[float, float]:
    model = toys.Weight()
    engine = _engine(model, stage)
    del engine
    model = toys.Weight()
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": training.zero(stage, 0),
        "optimizer": SGD,
    }
    engine = xtrain.initialize(model=model, config=settings)[0]
    engine.backward(engine(15.0))
    engine.step()
    return float(_weight(engine).norm()), engine.gradient_clipping()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_defaults_to_one_as_in_deepspeed(ranks: Any, stage: int) -> None:
    length, clipping = ranks(2, _default_clipping, stage)[0]
    assert length == pytest.approx(1.0, rel=1e-5)
    assert clipping == 1.0


def _buffers() -> tuple[torch.dtype, list[float], torch.dtype]:
    model = toys.Weight()
    model.register_buffer("frequencies", torch.tensor([300.0, 301.0, 302.5]))
    _engine(model, bf16={"enabled": True})
    return model.frequencies.dtype, model.frequencies.tolist(), model.weight.dtype


def test_buffers_keep_their_precision(ranks: Any) -> None:
    assert ranks(2, _buffers)[0] == (torch.float32, [300.0, 301.0, 302.5], torch.bfloat16)


def _script_clips(stage: int) -> tuple[torch.Tensor, float]:
    """The script's own clipping between backward and step, as many PyTorch scripts have it."""
    model = toys.Weight()
    engine = _engine(model, stage)
    norm = 0.0
    for step in range(3):
        engine.backward(engine(float(1 + engine.grid.rank + step)))
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        engine.step()
    return _weight(engine), norm


def test_gradients_are_the_mean_after_backward_in_stage_0(ranks: Any) -> None:
    (first, norm), (second, _) = ranks(2, _script_clips, 0)
    assert torch.equal(first, second)
    assert norm == pytest.approx(2 * 3.5)  # 4 elements of the mean gradient 3.5
    torch.testing.assert_close(first, torch.full((4,), -1.5))  # three steps of length 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_scripts_clipping_does_not_reach_divided_gradients(ranks: Any, stage: int) -> None:
    (first, norm), (second, _) = ranks(2, _script_clips, stage)
    assert torch.equal(first, second)
    assert norm == 0.0  # no gradients are shown, as in DeepSpeed
    torch.testing.assert_close(first, torch.full((4,), -(1.5 + 2.5 + 3.5)))


def _discard(how: str, stage: int) -> list[float]:
    model = toys.Weight()
    engine = _engine(model, stage, accumulation=2 if "mid" in how else 1)
    if how == "load":
        raise AssertionError
    if how == "raised":
        model.weight.register_hook(_boom)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.backward(engine(100.0))
        model.weight._backward_hooks.clear()
        engine.zero_grad()
    else:
        engine.backward(engine(100.0))
        {"engine": engine, "optimizer": engine.optimizer, "module mid": model, "engine mid": engine}[
            how
        ].zero_grad()
    for _ in range(2 if "mid" in how and how != "module mid" else 1):
        engine.backward(engine(4.0))
        engine.step()
    if how == "module mid":
        engine.step()
    return _weight(engine).tolist()


def _boom(_: torch.Tensor) -> None:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("how", ["engine", "optimizer", "raised", "engine mid"])
def test_a_discarded_backward_leaves_nothing(ranks: Any, how: str, stage: int) -> None:
    assert ranks(2, _discard, how, stage)[0] == [-4.0] * 4


def _module_zero_grad_in_the_window() -> list[float]:
    model = toys.Weight()
    engine = _engine(model, 0, accumulation=2)
    engine.backward(engine(100.0))
    engine.step()
    model.zero_grad()
    engine.backward(engine(4.0))
    engine.step()
    return model.weight.tolist()


def _create_graph() -> list[float]:
    model = toys.Weight()
    engine = _engine(model, 1)
    engine(3.0).backward(create_graph=True)
    engine.step()
    return model.weight.tolist()


def test_a_replaced_gradient_is_the_gradient(ranks: Any) -> None:
    assert ranks(1, _module_zero_grad_in_the_window)[0] == [-2.0] * 4
    assert ranks(2, _create_graph)[0] == [-3.0] * 4


def _load_in_the_window(folder: str) -> list[float]:
    model = toys.Weight()
    engine = _engine(model, 1, accumulation=2)
    engine.save_checkpoint(folder)
    engine.backward(engine(100.0))
    engine.step()
    engine.load_checkpoint(folder)
    for _ in range(2):
        engine.backward(engine(4.0))
        engine.step()
    return model.weight.tolist()


def test_loading_a_checkpoint_gives_up_the_window(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2, _load_in_the_window, str(tmp_path))[0] == [-4.0] * 4


def _gan(stage: int, through_engine: bool) -> tuple[list[float], list[float]]:
    """The usual two-network loop: the generator's backward reaches the discriminator's parameters."""
    results = []
    for engines in (True, False):
        torch.manual_seed(3)
        generator, judge = nn.Linear(3, 3), nn.Linear(3, 1)
        if engines:
            slow = {"type": "SGD", "params": {"lr": 0.05}}
            g, d = _engine(generator, stage, optimizer=slow), _engine(judge, stage, optimizer=slow)
        else:
            g, d = generator, judge
            optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (generator, judge)]
        for step in range(4):
            x = torch.randn(2, 3, generator=torch.Generator().manual_seed(step)) * 0.1
            (d if through_engine else judge).zero_grad()
            loss = d(g(x).detach()).square().mean() + (d(x) - 1).square().mean()
            d.backward(loss) if engines else loss.backward()
            d.step() if engines else optimizers[1].step()
            (g if through_engine else generator).zero_grad()
            loss = (d(g(x)) - 1).square().mean()
            g.backward(loss) if engines else loss.backward()
            g.step() if engines else optimizers[0].step()
        results.append([float(p.detach().double().sum()) for m in (generator, judge) for p in m.parameters()])
    return results[0], results[1]


@pytest.mark.parametrize(
    ("stage", "through_engine"), [(0, False), (0, True), (1, False), (1, True), (2, True)]
)
def test_two_engines_whose_backwards_overlap(ranks: Any, stage: int, through_engine: bool) -> None:
    ours, plain = ranks(2, _gan, stage, through_engine)[0]
    assert ours == pytest.approx(plain, rel=1e-4, abs=1e-6)


def _checkpointed(reentrant: bool, stage: int) -> list[float]:
    torch.manual_seed(0)
    model = toys.SharedByCheckpoints(reentrant)
    settings = training.config(stage, micro=8)
    settings["zero_optimization"]["reduce_bucket_size"] = 10
    engine = xtrain.initialize(model=model, config=settings)[0]
    return [training.engine_step(engine, step) for step in range(5)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_activation_checkpointing_with_shared_layers(ranks: Any, stage: int) -> None:
    plain = ranks(1, _checkpointed, False, 0)[0]
    for reentrant in (False, True):
        assert ranks(2, _checkpointed, reentrant, stage)[0] == pytest.approx(plain, rel=1e-5)


def _again() -> list[float]:
    model = toys.Weight()
    _engine(model, 1)
    engine = _engine(model, 1)
    engine.backward(engine(4.0))
    engine.step()
    return model.weight.tolist()


def test_a_model_can_be_given_to_a_second_engine(ranks: Any) -> None:
    assert ranks(2, _again)[0] == [-4.0] * 4


def _dropped(stage: int, destroy: bool, model_class: type[toys.Weight]) -> list[bool]:
    model = model_class()
    engine, optimizer, _, _ = xtrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": training.zero(stage, 0),
            "optimizer": SGD,
        },
    )
    engine.backward(engine(3.0))
    engine.step()
    states = [weakref.ref(item) for item in (engine, optimizer, engine.partition.trained[0], model)]
    if destroy:
        engine.destroy()
    del engine, optimizer, model
    gc.collect()
    gc.collect()  # what a graph held that the first one freed
    return [state() is None for state in states]


@pytest.mark.parametrize("model_class", [toys.Weight, toys.KeepsItsLoss])
@pytest.mark.parametrize("destroy", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_a_script_drops_is_freed(
    ranks: Any, stage: int, destroy: bool, model_class: type[toys.Weight]
) -> None:
    assert ranks(2, _dropped, stage, destroy, model_class)[0] == [True] * 4


def _optimizers() -> list[float]:
    model = toys.Weight()
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0}
    engine, returned, _, _ = xtrain.initialize(
        model=model, optimizer=torch.optim.Adagrad(model.parameters(), lr=0.5), config=settings
    )
    schedule = torch.optim.lr_scheduler.StepLR(returned, 1, gamma=0.5)
    for _ in range(2):
        engine.backward(engine(4.0))
        engine.step()
        schedule.step()
    return [float(model.weight[0].detach()), *engine.get_lr()]


def test_adagrad_and_a_torch_schedule_over_the_returned_optimizer(ranks: Any) -> None:
    weight, lr = ranks(2, _optimizers)[0]
    assert weight == pytest.approx(-0.5 - 0.25 * 4 / 32**0.5, rel=1e-5)
    assert lr == 0.125


def _managed(folder: str) -> tuple[bool, list[str]]:
    os.environ["XTRAIN_RUN_DIR"] = folder
    managed._engines.clear()
    try:
        engines = [_engine(toys.Weight(), 1), _engine(toys.Weight(), 1)]
        (Path(folder) / "logs").mkdir(exist_ok=True)
        for _ in range(2):
            for engine in engines:
                engine.backward(engine(1.0))
                engine.step()
        xtrain.comm.barrier()
        (Path(folder) / "stop").touch()
        engines[1].backward(engines[1](1.0))
        with pytest.raises(RunInterrupted):
            engines[1].step()
    finally:
        del os.environ["XTRAIN_RUN_DIR"]
        managed._engines.clear()
    return True, sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("latest"))


def test_two_engines_in_a_run_folder(ranks: Any, tmp_path: Path) -> None:
    _, saved = ranks(2, _managed, str(tmp_path))[0]
    assert saved == ["checkpoint/engine1/latest", "checkpoint/latest"]
    for name, steps in (("metrics.jsonl", 2), ("metrics-1.jsonl", 3)):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [line["step"] for line in lines if line["type"] == "step"] == list(range(1, steps + 1))


def _put_back(stage: int, bf16: bool) -> torch.Tensor:
    """An adversarial attack as scripts have it: change in place, run, put a copy back by `.data =`."""
    model = toys.Weight()
    engine = _engine(model, stage, bf16={"enabled": bf16})
    for _ in range(3):
        kept = {name: param.data.clone() for name, param in model.named_parameters()}
        for param in model.parameters():
            param.data.add_(8.0)
        engine(1.0)
        for name, param in model.named_parameters():
            param.data = kept[name]
        engine.backward(engine(1.0 + engine.grid.rank))
        engine.step()
    return model.weight.detach().float()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_weights_put_back_by_assignment_go_on_learning(ranks: Any, stage: int, bf16: bool) -> None:
    for weight in ranks(2, _put_back, stage, bf16):
        torch.testing.assert_close(weight, torch.full((4,), -4.5))


def _converted() -> None:
    model = toys.Weight()
    engine = _engine(model, stage=2)
    model.double()
    engine.backward(engine(1.0).float())
    engine.step()


def test_a_model_converted_after_initialize_is_refused(ranks: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"parameter 'weight' was replaced by torch\.float64 of shape \(4,\)"
    ):
        ranks(2, _converted)


def _optimizer_steps(stage: int, own_backward: bool, zero_grad: bool) -> torch.Tensor:
    model = toys.Weight()
    engine = _engine(model, stage)
    for _ in range(3):
        loss = engine(1.0 + engine.grid.rank)
        if own_backward:
            loss.backward()
        else:
            engine.backward(loss)
        engine.optimizer.step()
        if zero_grad:
            engine.optimizer.zero_grad()
    return _weight(engine)


@pytest.mark.parametrize(("own_backward", "zero_grad"), [(True, True), (False, False)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_optimizers_own_step_reduces(ranks: Any, stage: int, own_backward: bool, zero_grad: bool) -> None:
    for weight in ranks(2, _optimizer_steps, stage, own_backward, zero_grad):
        torch.testing.assert_close(weight, torch.full((4,), -4.5))


def _adds_a_group() -> None:
    with pytest.raises(NotImplementedYetError, match="add_param_group"):
        _engine(toys.Weight()).optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_param_groups_cannot_be_added_later(ranks: Any) -> None:
    ranks(2, _adds_a_group)


def _sparse(stage: int) -> torch.Tensor:
    class Lookup(nn.Module):
        """A sparse gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(3, 2, sparse=True)
            nn.init.zeros_(self.table.weight)

        def forward(self, index: int) -> torch.Tensor:
            return self.table(torch.tensor([index, index])).sum()

    model = Lookup()
    engine = _engine(model, stage)
    for _ in range(2):
        loss = engine(engine.grid.rank)
        model.zero_grad()  # many scripts do; the next gradient is then autograd's own, a sparse one
        engine.backward(loss)
        engine.step()
    return engine.module_state_dict()["table.weight"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sparse_gradients_after_zero_grad_of_the_module(ranks: Any, stage: int) -> None:
    wanted = torch.tensor([[-2.0, -2.0], [-2.0, -2.0], [0.0, 0.0]])
    torch.testing.assert_close(ranks(2, _sparse, stage)[0], wanted)


def _pickled(stage: int) -> torch.Tensor:
    model = toys.Weight()
    engine = _engine(model, stage)
    engine.backward(engine(1.0))
    engine.step()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    (-loaded(2.0)).backward()
    assert torch.equal(loaded.weight.grad, torch.full((4,), -2.0))
    return loaded.weight.detach()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_module_can_be_pickled(ranks: Any, stage: int) -> None:
    assert torch.equal(ranks(2, _pickled, stage)[0], torch.full((4,), -1.0))


def _destroyed_late() -> torch.Tensor:
    model = toys.Weight()
    former = _engine(model)
    engine = _engine(model)
    former.destroy()
    engine.backward(engine(1.0))
    engine.step()
    return _weight(engine)


def test_destroying_a_former_engine_leaves_the_present_one_alone(ranks: Any) -> None:
    assert torch.equal(ranks(2, _destroyed_late)[0], torch.full((4,), -1.0))


def _unfrozen(stage: int) -> tuple[int, Any]:
    model = toys.TwoWeights()
    model.other.requires_grad_(False)
    engine = _engine(model, stage)
    model.other.requires_grad_(True)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    for _ in range(2):
        engine.backward(engine(1.0))
        engine.step()
    logger.removeHandler(handler)
    return sum("'other'" in text for text in told), model.other.grad


@pytest.mark.parametrize("stage", [0, 3])
def test_a_parameter_unfrozen_too_late_is_told_once(ranks: Any, stage: int) -> None:
    assert ranks(2, _unfrozen, stage) == [(1, None), (0, None)]
