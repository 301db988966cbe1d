"""What is compared: the runs of examples/pretrain_glm.py whose curves are recorded in golden.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_glm.py"
GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 50
CASES = [(dtype, ranks) for dtype in ("fp32", "bf16") for ranks in (1, 2)]
LR, BETAS, EPS, DECAY, CLIP, WARMUP = 2e-3, (0.9, 0.95), 1e-8, 0.01, 1.0, 5


def case_name(dtype: str, ranks: int) -> str:
    return f"{dtype}, ZeRO 1, {ranks} rank{'s' if ranks > 1 else ''}"


def flags(corpus: Path) -> list[str]:
    """Script arguments: glm_tiny on the given corpus."""
    model = yaml.safe_load((ROOT / "conf" / "model" / "glm_tiny.yaml").read_text())
    del model["name"]
    sizes = [f"--{key.replace('_', '-')}={value}" for key, value in model.items()]
    return [*sizes, "--data-path", str(corpus), f"--steps={STEPS}", f"--weight-decay={DECAY}"]


def ds_config(dtype: str, torch_adam: bool) -> dict[str, Any]:
    """The DeepSpeed config; `torch_adam` spares DeepSpeed the compilation of its own kernel."""
    params: dict[str, Any] = {"lr": LR, "betas": list(BETAS), "eps": EPS}
    if torch_adam:
        params["torch_adam"] = True
    return {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": params},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_max_lr": LR,
                "warmup_num_steps": WARMUP,
                "warmup_type": "linear",
                "total_num_steps": STEPS,
            },
        },
    }


def write_config(folder: Path, dtype: str, torch_adam: bool) -> Path:
    path = folder / f"ds_config_{dtype}.json"
    path.write_text(json.dumps(ds_config(dtype, torch_adam)))
    return path


def load_script(engine: str) -> ModuleType:
    """The example as a module, with its first import of xtrain swapped for the named engine."""
    source = SCRIPT.read_text()
    line = "import xtrain as deepspeed\n"
    assert source.count(line) == 1
    source = source.replace(line, "import deepspeed\n" if engine == "deepspeed" else line)
    module = ModuleType("pretrain_glm_" + engine)
    module.__file__ = str(SCRIPT)
    exec(compile(source, str(SCRIPT), "exec"), module.__dict__)
    return module


def closed_form_rate(step: int) -> float:
    """Learning rate of optimizer step `step` (from 0), written down apart from any scheduler."""
    iteration = step - 1
    if iteration < 0:
        return 0.0
    if iteration < WARMUP:
        return LR * iteration / WARMUP
    return LR * (STEPS - iteration) / (STEPS - WARMUP)
