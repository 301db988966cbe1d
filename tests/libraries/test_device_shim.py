"""On the host, with the device shim: libraries that ask for CUDA find it, and no line of the script is changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.libraries import test_lightning, test_trainer
from tests.libraries.test_trainer import close

Ranks = Callable[..., list[Any]]

SCRIPT = """
import json, sys
import torch
import lightning
from lightning.pytorch.strategies import DeepSpeedStrategy
from transformers import Trainer, TrainingArguments
from tests.libraries import tiny
from tests.libraries.test_lightning import STEPS, _lit, _loader

import deepspeed
assert "site-packages" not in deepspeed.__file__, deepspeed.__file__
written, folder = sys.argv[1:]
arguments = TrainingArguments(
    deepspeed=tiny.zero(2), output_dir=folder, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
    warmup_steps=2, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, seed=3,
)
assert arguments.device.type == "cuda" or torch.device("cuda").type == "cpu", arguments.device
trainer = Trainer(tiny.model(), arguments, train_dataset=tiny.ids())
trainer.train()
curve = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]

losses = []
lightning.Trainer(
    accelerator="gpu", devices=2, strategy=DeepSpeedStrategy(stage=3, logging_batch_size_per_gpu=2), max_epochs=2,
    gradient_clip_val=1.0, logger=False, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False,
).fit(_lit(losses), _loader(STEPS // 2))
if torch.distributed.get_rank() == 0:
    json.dump({"trainer": curve, "lightning": losses}, open(written, "w"))
"""


def test_trainer_and_lightning(ranks: Ranks, tmp_path: Path) -> None:
    script, written = tmp_path / "script.py", tmp_path / "written.json"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "xtrain.cli", "run", "--device-shim", "on"),
            *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(str(script), str(written), str(tmp_path)),
        ],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    ours = json.loads(written.read_text())
    close([tuple(line) for line in ours["trainer"]], test_trainer.DEEPSPEEDS_OWN, 1e-4)
    close(ours["lightning"], ranks(2, test_lightning._trained, str(tmp_path), None)[0])
