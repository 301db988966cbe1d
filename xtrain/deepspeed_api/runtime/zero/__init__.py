"""`deepspeed.runtime.zero`: whatever xtrain.zero offers, and the modules here."""

from typing import Any

from xtrain import zero
from xtrain.deepspeed_api.compat import packages

_module = packages.attributes(__name__)


def __getattr__(name: str) -> Any:
    # Not all that xtrain.zero has: its modules have the names of some here.
    return getattr(zero, name) if name in zero.__all__ else _module(name)
