"""Accelerate: a loop of one's own, two plug-ins in one process, `accelerate launch`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.libraries import tiny
from tests.libraries.test_trainer import close

Ranks = Callable[..., list[Any]]
BATCH = 2


def _loader() -> Any:
    return torch.utils.data.DataLoader(tiny.ids(), batch_size=BATCH)  # type: ignore[arg-type]


def _plugin(stage: int, **more: Any) -> Any:
    from accelerate.utils import DeepSpeedPlugin

    config = tiny.zero(stage, gradient_clipping=1.0, **more)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def _loop(accelerator: Any) -> list[float]:
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, _loader())
    return _steps(accelerator, model, optimizer, loader)


def _steps(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> list[float]:
    losses = []
    for batch, _ in zip(loader, range(6), strict=False):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()[None]).mean().item())
    return losses


def _accelerated(stage: int | None) -> list[float]:
    from accelerate import Accelerator

    with tiny.fresh():
        if stage is None:
            return _loop(Accelerator(cpu=True, gradient_accumulation_steps=2))
        return _loop(Accelerator(deepspeed_plugin=_plugin(stage), gradient_accumulation_steps=2))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loop_of_ones_own(ranks: Ranks, stage: int) -> None:
    close(ranks(2, _accelerated, stage)[0], ranks(2, _accelerated, None)[0])


def _saved_and_loaded(folder: str, stage: int) -> tuple[list[float], list[float]]:
    """Losses after `save_state`, and those after `load_state`."""
    from accelerate import Accelerator

    with tiny.fresh():
        accelerator = Accelerator(deepspeed_plugin=_plugin(stage), gradient_accumulation_steps=2)
        model = tiny.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
        model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, _loader())
        _steps(accelerator, model, optimizer, loader)
        accelerator.save_state(folder)
        after = _steps(accelerator, model, optimizer, loader)
        accelerator.load_state(folder)
        again = _steps(accelerator, model, optimizer, loader)
        state = accelerator.get_state_dict(model)
        expected = tiny.model().state_dict()
        if accelerator.is_main_process:
            assert {name: value.shape for name, value in state.items()} == {
                name: value.shape for name, value in expected.items()
            }
        return after, again


@pytest.mark.parametrize("stage", [1, 3])
def test_save_and_load_state(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    after, again = ranks(2, _saved_and_loaded, str(tmp_path), stage)[0]
    assert again == after


def _from_the_config() -> list[float]:
    """Accelerate's placeholders for what the config names."""
    from accelerate import Accelerator
    from accelerate.utils import DummyOptim, DummyScheduler

    adam = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    warmup = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
    schedule = {"type": "WarmupLR", "params": warmup}
    with tiny.fresh():
        plugin = _plugin(2, optimizer=adam, scheduler=schedule)
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2)
        model = tiny.model()
        optimizer = DummyOptim(model.parameters(), lr=1e-2, weight_decay=0.01)
        scheduler = DummyScheduler(optimizer, warmup_num_steps=1)
        model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, _loader())
        return _steps(accelerator, model, optimizer, loader)


def test_optimizer_and_schedule_of_the_config(ranks: Ranks) -> None:
    losses, plain = ranks(2, _from_the_config)[0], ranks(2, _accelerated, None)[0]
    close(losses[:2], plain[:2])  # what follows has DeepSpeed's schedule
    assert losses[-1] < losses[0]


def _teacher_and_student() -> tuple[list[float], list[float]]:
    """A student in stage 2 learns; a teacher, whose plug-in has no optimizer, answers in stage 3.

    Returns:
        The student's losses, and those of the teacher, which has the weights that the student begins with.
    """
    from accelerate import Accelerator
    from accelerate.utils.deepspeed import get_active_deepspeed_plugin

    with tiny.fresh():
        plugins = {"student": _plugin(2), "teacher": _plugin(3)}
        accelerator = Accelerator(deepspeed_plugins=plugins, gradient_accumulation_steps=2)
        assert get_active_deepspeed_plugin(accelerator.state) is plugins["student"]
        student = tiny.model()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        student, optimizer, loader = accelerator.prepare(student, optimizer, _loader())
        accelerator.state.select_deepspeed_plugin("teacher")
        plugins["teacher"].deepspeed_config["train_micro_batch_size_per_gpu"] = BATCH
        teacher = accelerator.prepare(tiny.model())
        accelerator.state.select_deepspeed_plugin("student")
        assert (student.zero_optimization_stage(), teacher.zero_optimization_stage()) == (2, 3)
        losses = _steps(accelerator, student, optimizer, loader)
        with torch.no_grad():
            answers = [teacher(**batch).loss for batch, _ in zip(loader, range(2), strict=False)]
        return losses, [accelerator.gather(answer[None]).mean().item() for answer in answers]


def test_two_plugins(ranks: Ranks) -> None:
    losses, answers = ranks(2, _teacher_and_student)[0]
    close(losses, ranks(2, _accelerated, None)[0])
    close(answers, losses[:2])  # of the first update's accumulation window


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return int(listening.getsockname()[1])


SCRIPT = """
import json, sys
from tests.libraries.test_accelerate import _loop
from accelerate import Accelerator
accelerator = Accelerator()
assert accelerator.state.deepspeed_plugin.zero_stage == 3, accelerator.state
losses = _loop(accelerator)
if accelerator.is_main_process:
    json.dump(losses, open(sys.argv[1], "w"))
"""


def test_accelerate_launch(ranks: Ranks, tmp_path: Path) -> None:
    """`xtrain run` reaches the ranks, and `deepspeed` in them is xtrain."""
    script, written = tmp_path / "script.py", tmp_path / "losses.json"
    script.write_text(SCRIPT)
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "xtrain.cli", "run", "--device-shim", "on"),
            *("-m", "accelerate.commands.launch", "--use_deepspeed", "--num_processes=2", "--num_machines=1"),
            *("--zero_stage=3", "--gradient_accumulation_steps=2", "--gradient_clipping=1.0"),
            *("--mixed_precision=no", "--dynamo_backend=no", "--zero3_init_flag=false"),
            *(f"--main_process_port={free_port()}", str(script), str(written)),
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    close(json.loads(written.read_text()), ranks(2, _accelerated, None)[0])
