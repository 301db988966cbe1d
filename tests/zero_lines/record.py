"""Records real DeepSpeed's curves of the Megatron-style script: `python -m tests.zero_lines.record`.

Needs the extra deepspeed. Writes tests/zero_lines/golden.json.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPT = HERE / "megatron_style" / "pretrain.py"
GOLDEN = HERE / "golden.json"
CASES: dict[str, tuple[str, list[str]]] = {
    "fp32": ("fp32", []),
    "fp32, two ranks a model, recomputed, dropout": (
        "fp32",
        ["--model-parallel-size=2", "--checkpoint-activations", "--dropout=0.1"],
    ),
    "bf16": ("bf16", []),
    "bf16, two ranks a model": ("bf16", ["--model-parallel-size=2"]),
}
"""Precision and the script's other arguments, for two ranks."""


def config(precision: str, stage: int = 1) -> dict[str, Any]:
    """The DeepSpeed config of a case."""
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000,
    }
    if precision == "bf16":
        made["bf16"] = {"enabled": True}
    return made


def arguments(case: str, folder: Path, stage: int = 1) -> list[str]:
    """The script's arguments; losses go to folder/losses.json."""
    precision, more = CASES[case]
    (folder / "ds_config.json").write_text(json.dumps(config(precision, stage)))
    given = ["--deepspeed", f"--deepspeed_config={folder}/ds_config.json", f"--record={folder}/losses.json"]
    return [*given, f"--precision={precision}", *more]


def recorded(case: str) -> list[float]:
    """Real DeepSpeed's losses."""
    return list(json.loads(GOLDEN.read_text())["curves"][case])


def main() -> int:
    curves = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
            command += ["-m", "tests.zero_lines.beside_real", str(SCRIPT), *arguments(case, folder)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            subprocess.run(command, cwd=HERE.parents[1], env=env, check=True)
            curves[case] = json.loads((folder / "losses.json").read_text())
    versions = {name: importlib.metadata.version(name) for name in ("deepspeed", "torch")}
    record = {"command": "python -m tests.zero_lines.record", "versions": versions, "curves": curves}
    GOLDEN.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
