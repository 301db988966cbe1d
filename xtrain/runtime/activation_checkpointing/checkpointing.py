"""`deepspeed.runtime.activation_checkpointing.checkpointing`: whatever xtrain.checkpointing offers."""

from typing import Any

from xtrain import checkpointing


def __getattr__(name: str) -> Any:
    return getattr(checkpointing, name)
