"""Finding a backend by name, by environment or by what the machine has.

Third-party packages add one through the entry point group `xtrain.backends` (name = module:Class).
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from xtrain.backends.base import Backend
from xtrain.errors import BackendError, unknown_name

_BUILTIN = {"cpu": "xtrain.backends.cpu:CpuBackend"}
_NOT_YET = ("cuda", "dcu", "ascend", "sunway", "fake")
_DS_NAMES = {"npu": "ascend", "hpu": "hpu", "cpu": "cpu", "cuda": "cuda"}
"""DS_ACCELERATOR values whose backend here has another name (or the same)."""


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="xtrain.backends")}


def names() -> list[str]:
    """Names of all backends that can be asked for, built in and installed."""
    return sorted({*_BUILTIN, *_plugins()})


@cache
def _load(name: str) -> Backend:
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)()
    return _plugins()[name].load()()


def get(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: no such backend, or it cannot be used on this machine (the reason is given).
    """
    if name not in names():
        if name in _NOT_YET:
            raise BackendError(
                f"backend {name!r} is not there yet in xtrain: use one of {', '.join(names())}"
            )
        raise BackendError(unknown_name("backend", name, names()))
    backend = _load(name)
    reason = backend.runtime.unavailable_reason()
    if reason is not None:
        raise BackendError(f"backend {name!r} cannot be used here: {reason}")
    return backend


def available() -> dict[str, str | None]:
    """For each backend, None when it can be used here, else the reason why not."""
    return {name: _load(name).runtime.unavailable_reason() for name in names()}


def detect(name: str | None = None) -> Backend:
    """The backend to use: `name` (from the config), else the environment, else what the machine has.

    Environment: XTRAIN_BACKEND, then DS_ACCELERATOR. An installed plug-in that is available is
    preferred to the host processor.
    """
    chosen = name or os.environ.get("XTRAIN_BACKEND")
    if not chosen and (accelerator := os.environ.get("DS_ACCELERATOR")):
        chosen = _DS_NAMES.get(accelerator, accelerator)
    if chosen:
        return get(chosen)
    for candidate in names():
        if candidate != "cpu" and _load(candidate).runtime.unavailable_reason() is None:
            return _load(candidate)
    return get("cpu")
