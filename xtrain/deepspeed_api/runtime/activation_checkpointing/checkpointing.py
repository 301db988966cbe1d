"""`deepspeed.checkpointing`, and its other path: whatever xtrain.activation_checkpointing.checkpointing offers."""

from typing import TYPE_CHECKING, Any

from xtrain.activation_checkpointing import checkpointing

if TYPE_CHECKING:
    from xtrain.activation_checkpointing.checkpointing import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return getattr(checkpointing, name)
