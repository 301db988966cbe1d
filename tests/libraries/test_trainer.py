"""Hugging Face's Trainer: ZeRO 0 to 3 against the same Trainer on plain DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.libraries import tiny

Ranks = Callable[..., list[Any]]
STEPS = 4


def _arguments(folder: str, stage: int | None, batch: int = 2, **more: Any) -> Any:
    from transformers import TrainingArguments

    given: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }
    if stage is None:
        return TrainingArguments(use_cpu=True, **given)
    return TrainingArguments(deepspeed=tiny.zero(stage), **given)


def _curve(trainer: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]


def _train(
    folder: str, stage: int | None, resume: str | None = None, **more: Any
) -> list[tuple[float, float]]:
    from transformers import Trainer

    with tiny.fresh():
        arguments = _arguments(folder, stage, **more)
        trainer = Trainer(tiny.model(), arguments, train_dataset=tiny.ids())  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        return _curve(trainer)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Trainer without any DeepSpeed."""
    cache: list[Any] = []

    def get(ranks: Ranks) -> Any:
        if not cache:
            cache.append(ranks(2, _train, str(tmp_path_factory.mktemp("plain")), None)[0])
        return cache[0]

    return get


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages(ranks: Ranks, plain: Any, tmp_path: Path, stage: int) -> None:
    close(ranks(2, _train, str(tmp_path), stage)[0], plain(ranks))


def test_gradient_checkpointing(ranks: Ranks, plain: Any, tmp_path: Path) -> None:
    close(ranks(2, _recomputed, str(tmp_path))[0], plain(ranks))


def _recomputed(folder: str) -> Any:
    return _train(folder, 3, gradient_checkpointing=True)


def _compiled(folder: str) -> Any:
    return _train(folder, 3, torch_compile=True, torch_compile_backend="aot_eager")


def test_torch_compile(ranks: Ranks, plain: Any, tmp_path: Path) -> None:
    close(ranks(2, _compiled, str(tmp_path))[0], plain(ranks))


def _adapted(folder: str, stage: int | None, reentrant: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """The curve of a LoRA with gradient checkpointing, and the adapter that was saved."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import Trainer

    with tiny.fresh():
        arguments = _arguments(
            folder,
            stage,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        model = get_peft_model(tiny.model(), lora)
        if reentrant:
            model.enable_input_require_grads()
        trainer = Trainer(model, arguments, train_dataset=tiny.ids())  # type: ignore[arg-type]
        trainer.train()
        trainer.save_model(folder)
        torch.distributed.barrier()
        return _curve(trainer), load_file(f"{folder}/adapter_model.safetensors")


def test_peft_with_gradient_checkpointing(ranks: Ranks, tmp_path: Path) -> None:
    theirs, expected = ranks(2, _adapted, str(tmp_path / "plain"), None, False)[0]
    for stage, reentrant in ((2, False), (3, False), (3, True)):
        ours, adapter = ranks(2, _adapted, str(tmp_path / f"{stage}-{reentrant}"), stage, reentrant)[0]
        close(ours, theirs, 1e-4)
        torch.testing.assert_close(adapter, expected, rtol=1e-3, atol=1e-4)


def _saving(folder: str, stage: int) -> Any:
    return _train(folder, stage, save_strategy="steps", save_steps=2)


def _resumed(folder: str, stage: int, batch: int) -> Any:
    return _train(folder, stage, resume=f"{folder}/checkpoint-2", batch=batch)


@pytest.mark.parametrize(("saved", "stage"), [(2, 2), (3, 3), (3, 1)])
def test_resume_on_one_rank(ranks: Ranks, plain: Any, tmp_path: Path, saved: int, stage: int) -> None:
    """Two ranks save in one stage, one rank goes on in another; the global batch stays."""
    close(ranks(2, _saving, str(tmp_path), saved)[0], plain(ranks))
    close(ranks(1, _resumed, str(tmp_path), stage, 4)[0], plain(ranks))


def _best(folder: str, stage: int) -> tuple[float, list[float], float]:
    from transformers import Trainer

    with tiny.fresh():
        arguments = _arguments(
            folder,
            stage,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that it is not the last one
        )
        trainer = Trainer(tiny.model(), arguments, train_dataset=tiny.ids(), eval_dataset=tiny.ids(16))
        trainer.train()
        seen = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        return trainer.state.best_metric, seen, trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("stage", [2, 3])
def test_best_model_at_the_end(ranks: Ranks, tmp_path: Path, stage: int) -> None:
    best, seen, now = ranks(2, _best, str(tmp_path), stage)[0]
    assert seen[0] == max(seen) == best > seen[-1]
    assert now == pytest.approx(best, rel=1e-6)
