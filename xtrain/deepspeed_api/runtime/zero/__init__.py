"""`deepspeed.runtime.zero`: whatever xtrain.zero offers, and the modules here."""

from typing import Any

from xtrain import zero
from xtrain.deepspeed_api.compat import packages

_module = packages.attributes(__name__)


def __getattr__(name: str) -> Any:
    if name in zero.__all__:
        return getattr(zero, name)
    try:
        return _module(name)  # before those of xtrain.zero, of which some have the same names
    except AttributeError:
        if name in vars(zero):
            return vars(zero)[name]
        raise
