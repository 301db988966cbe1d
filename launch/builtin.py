"""Where the built-in training script is."""

from __future__ import annotations

from pathlib import Path

from xtrain.base.errors import ConfigError

BUILTIN = "builtin"
"""Stands for the script's path where that is another one than here: in an image."""


def builtin_script() -> Path:
    """The GLM pretraining script: beside this package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (
        package / "examples" / "pretrain_glm.py",
        package.parent / "examples" / "pretrain_glm.py",
    ):
        if candidate.is_file():
            return candidate
    raise ConfigError("the built-in script pretrain_glm.py is missing: reinstall xtrain or pass script=")
