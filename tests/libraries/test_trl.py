"""TRL: SFT, DPO, KTO and GRPO in stage 3, with and without LoRA, next to the same trainers without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.libraries import tiny
from tests.libraries.test_trainer import close

Ranks = Callable[..., list[Any]]
STEPS = 3


def _rows(kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(tiny.SAMPLES):
        prompt, answer = tiny.text(number, 3), " " + tiny.text(number, 4, 8)
        if kind == "sft":
            rows.append({"prompt": prompt, "completion": answer})
        elif kind == "dpo":
            rows.append({"prompt": prompt, "chosen": answer, "rejected": " " + tiny.text(number, 4, 9)})
        elif kind == "kto":
            rows.append({"prompt": prompt, "completion": answer, "label": number % 2 == 0})
        else:
            rows.append({"prompt": prompt})
    return rows


def _reward(completions: list[str], **_: Any) -> list[float]:
    """The number of different words."""
    return [float(len(set(completion.split()))) for completion in completions]


def _own(kind: str) -> dict[str, Any]:
    """What only this kind of trainer takes."""
    if kind == "grpo":
        return {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "generation_batch_size": 8}
    if kind == "sft":
        return {"max_length": 16, "packing": False}
    return {"max_length": 16}


def _trained(kind: str, stage: int | None, lora: bool, folder: str, model: str) -> list[tuple[float, ...]]:
    """Loss and gradient norm of each step; GRPO's reward, too.

    Args:
        model: the folder that it is read from, once more where the trainer needs one to compare with.
    """
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    trainer_class = getattr(trl, f"{kind.upper()}Trainer")
    with tiny.fresh():
        given: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "seed": 3,
            "bf16": False,
            **_own(kind),
        }
        given.update({"use_cpu": True} if stage is None else {"deepspeed": tiny.zero(stage)})
        trainer = trainer_class(
            model=model,
            args=getattr(trl, f"{kind.upper()}Config")(**given),
            train_dataset=Dataset.from_list(_rows(kind)),
            processing_class=tiny.tokenizer(),
            peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if lora else None,
            **({"reward_funcs": _reward} if kind == "grpo" else {}),
        )
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        names = ("loss", "grad_norm", *(["reward"] if kind == "grpo" else []))
        return [tuple(float(line[name]) for name in names) for line in lines]


DEEPSPEEDS_OWN = {
    ("dpo", False): [(0.693147, 0.497967), (0.677452, 0.472545), (0.699083, 0.435398)],
    ("kto", False): [(0.5, 0.174393), (0.499088, 0.153883), (0.49844, 0.168368)],
    ("grpo", False): [(-0.087034, 1.125072, 4.875), (-0.130397, 1.254103, 4.25), (-0.26542, 1.177265, 4.25)],
    ("grpo", True): [(-0.087034, 0.18449, 4.875), (-0.132048, 0.142501, 4.375), (-0.267361, 0.189735, 4.25)],
}
"""Of deepspeed 0.19.8; see tests/libraries/test_trainer.py."""


def _save(folder: str) -> None:
    tiny.model().save_pretrained(folder)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo"])
def test_stage3(ranks: Ranks, tmp_path: Path, kind: str, lora: bool) -> None:
    model = str(tmp_path / "model")
    ranks(1, _save, model)
    ours = ranks(2, _trained, kind, 3, lora, str(tmp_path), model)[0]
    theirs = ranks(2, _trained, kind, None, lora, str(tmp_path), model)[0]
    close(ours, theirs, 1e-4)
    if (kind, lora) in DEEPSPEEDS_OWN:
        close(ours, DEEPSPEEDS_OWN[kind, lora], 1e-3)


def _evaluated(stage: int | None, folder: str, model: str) -> list[float]:
    """Rewards of an evaluation before any training: there is no optimizer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    with tiny.fresh():
        zero: dict[str, Any] = {"use_cpu": True} if stage is None else {"deepspeed": tiny.zero(stage)}
        trainer = GRPOTrainer(
            model=model,
            args=GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=4,
                per_device_eval_batch_size=4,
                num_generations=4,
                max_completion_length=6,
                report_to=[],
                disable_tqdm=True,
                seed=3,
                bf16=False,
                **zero,
            ),
            eval_dataset=Dataset.from_list(_rows("grpo")[:4]),
            train_dataset=Dataset.from_list(_rows("grpo")),
            processing_class=tiny.tokenizer(),
            reward_funcs=_reward,
        )
        return [trainer.evaluate()["eval_reward"]]


def test_generation_without_an_optimizer(ranks: Ranks, tmp_path: Path) -> None:
    model = str(tmp_path / "model")
    ranks(1, _save, model)
    ours = ranks(2, _evaluated, 3, str(tmp_path), model)[0]
    assert ours == ranks(2, _evaluated, None, str(tmp_path), model)[0]
