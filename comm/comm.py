"""`deepspeed.comm.comm`: whatever `xtrain.comm` offers, by the path of DeepSpeed's inner module."""

from typing import Any

from xtrain import comm
from xtrain.comm import *  # noqa: F403


def __getattr__(name: str) -> Any:
    return getattr(comm, name)
