"""Command lines that start training, and CUDA's variables, in shell scripts: by words, no shell is asked."""

from __future__ import annotations

import re
from collections.abc import Iterator

from xtrain.migrate.use import Use

SHELL_SUFFIXES = (".sh", ".bash", ".slurm", ".sbatch", ".pbs")

VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS",
    "PYTORCH_CUDA_ALLOC_CONF", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST",
)  # fmt: skip
_VARIABLE = re.compile(rf"\b({'|'.join(VARIABLES)}|NCCL_[A-Z0-9_]+)\b")
# A command stands at the start, after what separates commands, or after words that hand on to it.
_BEFORE = (
    r"(?:^|[;&|(`]|\$\(|\b(?:then|do|else|exec|eval|nohup|time|srun|mpirun|sudo|xargs)\b[^;&|]*?\s|[\"'])\s*"
    r"(?:[A-Za-z_]\w*=\S*\s+)*"
)
_COMMANDS = (
    ("deepspeed", r"(?:\S*/)?deepspeed(?=\s+[^=\s])"),
    ("ds_report", r"(?:\S*/)?ds_report\b"),
    ("torchrun", r"(?:\S*/)?torchrun(?=\s)"),
    ("torch.distributed.run", r"\S*python[\d.]*\s(?:[^;&|]*?\s)?-m\s+torch\.distributed\.(?:run|launch)\b"),
    ("accelerate launch", r"(?:\S*/)?accelerate\s+launch\b"),
    ("deepspeed launcher", r"\S*python[\d.]*\s(?:[^;&|]*?\s)?-m\s+deepspeed\b"),
)
_PATTERNS = tuple((name, re.compile(_BEFORE + pattern)) for name, pattern in _COMMANDS)


def command_of(line: str) -> str | None:
    """The launcher that a line calls, or None."""
    return next((name for name, pattern in _PATTERNS if pattern.search(line)), None)


def variables_of(text: str) -> list[str]:
    """CUDA's and NCCL's environment variables that a text names, each once."""
    return list(dict.fromkeys(_VARIABLE.findall(text)))


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number of the first line, the line) with continued ones joined and comments left out."""
    start = 0
    parts: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not parts:
            if not stripped or stripped.startswith("#"):
                continue
            start = number
        parts.append(stripped.removesuffix("\\").strip())
        if not stripped.endswith("\\"):
            yield start, " ".join(parts)
            parts = []
    if parts:
        yield start, " ".join(parts)


def commands(text: str, shown: str, cell: int | None = None) -> list[Use]:
    """The uses in a shell script."""
    found = []
    for number, line in _logical_lines(text):
        name = command_of(line)
        if name is not None:
            found.append(Use(shown, number, "launch", name, cell=cell, value=line))
        found += [Use(shown, number, "environment", variable, cell=cell) for variable in variables_of(line)]
    return found
