"""`deepspeed.runtime.zero`: whatever xtrain.zero offers, and the modules here."""

from typing import Any

from xtrain import zero
from xtrain.deepspeed_api.compat import packages

_module = packages.attributes(__name__)


def __getattr__(name: str) -> Any:
    return getattr(zero, name) if hasattr(zero, name) else _module(name)
