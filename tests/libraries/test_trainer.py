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
    zero = given.pop("zero", {})
    if stage is None:
        return TrainingArguments(use_cpu=True, **given)
    return TrainingArguments(deepspeed=tiny.zero(stage, **zero), **given)


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


DEEPSPEEDS_OWN = [(3.399225, 1.809853), (3.383367, 1.668135), (3.374974, 1.569367), (3.375754, 1.694899)]
"""The curve of deepspeed 0.19.8 in stages 2 and 3, with the versions in constraints.txt, on two ranks of a host:
`_train`, called in processes that have not imported xtrain.as_deepspeed."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stages(ranks: Ranks, plain: Any, tmp_path: Path, stage: int) -> None:
    ours = ranks(2, _train, str(tmp_path), stage)[0]
    close(ours, plain(ranks))
    close(ours, DEEPSPEEDS_OWN, 1e-4)


def test_gradient_checkpointing(ranks: Ranks, plain: Any, tmp_path: Path) -> None:
    close(ranks(2, _recomputed, str(tmp_path))[0], plain(ranks))


def _recomputed(folder: str) -> Any:
    return _train(folder, 3, gradient_checkpointing=True)


AUTO = {
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_type": "linear",
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
}
"""The sections of Trainer's documentation."""


def _from_the_config(folder: str, stage: int) -> Any:
    return _train(folder, stage, zero=AUTO)


def _at_these_rates(folder: str, factors: list[float]) -> Any:
    """Without DeepSpeed."""
    from transformers import Trainer

    with tiny.fresh():
        model = tiny.model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [*factors, 0.0].__getitem__)
        trainer = Trainer(
            model,
            _arguments(folder, None),
            train_dataset=tiny.ids(),  # type: ignore[arg-type]
            optimizers=(optimizer, schedule),
        )
        trainer.train()
        return _curve(trainer)


def test_optimizer_and_schedule_of_the_config(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's schedule stays at a rate of zero for one step more than Trainer's own."""
    ours = ranks(2, _from_the_config, str(tmp_path), 2)[0]
    close(ours, ranks(2, _at_these_rates, str(tmp_path), [0.0, 0.0, 0.5, 1.0])[0])


def _saved_model(folder: str, gather: bool) -> tuple[float, dict[str, Any] | None]:
    """The loss of the trained model, and what is read of the saved one."""
    from transformers import LlamaForCausalLM, Trainer

    with tiny.fresh():
        arguments = _arguments(folder, 3)
        arguments.deepspeed["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = gather
        arguments.hf_deepspeed_config.config["zero_optimization"].update(
            stage3_gather_16bit_weights_on_model_save=gather
        )
        data = tiny.ids()
        trainer = Trainer(tiny.model(), arguments, train_dataset=data, eval_dataset=data)  # type: ignore[arg-type]
        trainer.train()
        trainer.save_model(folder)
        torch.distributed.barrier()
        loss = trainer.evaluate()["eval_loss"]
    if not gather:
        from xtrain.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        return loss, get_fp32_state_dict_from_zero_checkpoint(folder)
    return loss, LlamaForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("gather", [True, False])
def test_saved_model_of_stage_3(ranks: Ranks, tmp_path: Path, gather: bool) -> None:
    """As a file of transformers; or, where the config does not gather, as a checkpoint of the engine."""
    for loss, weights in ranks(2, _saved_model, str(tmp_path), gather):
        assert loss == pytest.approx(ranks(1, _loss_of, weights)[0], rel=1e-5)


def _loss_of(weights: dict[str, Any]) -> float:
    model = tiny.model()
    model.load_state_dict(weights)
    rows = tiny.ids()
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        return float(model.eval()(**stacked).loss)


def _compiled(folder: str) -> Any:
    return _train(folder, 3, torch_compile=True, torch_compile_backend="eager")


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
