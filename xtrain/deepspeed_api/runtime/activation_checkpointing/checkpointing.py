"""`deepspeed.runtime.activation_checkpointing.checkpointing`: whatever xtrain.checkpointing offers."""

from typing import Any

from xtrain.activation_checkpointing import checkpointing


def __getattr__(name: str) -> Any:
    return getattr(checkpointing, name)
