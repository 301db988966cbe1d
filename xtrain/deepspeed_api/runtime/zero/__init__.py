"""`deepspeed.runtime.zero`: whatever xtrain.zero offers, and the modules here."""

from typing import Any

from xtrain import zero
from xtrain.deepspeed_api.compat import packages

_module = packages.attributes(__name__)


def __getattr__(name: str) -> Any:
    try:
        return _module(name)  # first: modules of xtrain.zero have the names of some here
    except AttributeError:
        if hasattr(zero, name):
            return getattr(zero, name)
        raise
