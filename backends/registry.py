"""Finding a backend by name, by environment or by what the machine has.

Third-party packages add one through the entry point group `xtrain.backends` (name = module:Class).
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from xtrain.backends.backend import Backend
from xtrain.base.errors import BackendError, unknown_name
from xtrain.base.log import log_dist

_BUILTIN = {
    # In the order of detection; the host is what is left.
    "cuda": "xtrain.backends.cuda:CudaBackend",
    "dcu": "xtrain.backends.dcu:DcuBackend",
    "ascend": "xtrain.backends.ascend:AscendBackend",
    "sunway": "xtrain.backends.sunway:SunwayBackend",
    "fake": "xtrain.backends.fake:FakeBackend",  # never taken unasked
    "cpu": "xtrain.backends.cpu:CpuBackend",
}
_DS_NAMES = {"npu": ("ascend",), "cuda": ("cuda", "dcu")}
"""DS_ACCELERATOR values whose backend here has another name, or that mean one of several (under HIP, DeepSpeed
calls its accelerator cuda as torch does)."""


@cache
def _plugins() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="xtrain.backends")}


def names() -> list[str]:
    """Names of all backends that can be asked for, built in and installed."""
    return sorted({*_BUILTIN, *_plugins()})


@cache
def _load(name: str) -> Backend:
    """The backend's only instance.

    Raises:
        BackendError: an installed package's cannot be loaded.
    """
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        return getattr(importlib.import_module(module), attribute)()
    try:
        backend = _plugins()[name].load()()
    except Exception as error:  # somebody else's code: anything can happen
        raise BackendError(f"its package does not load ({type(error).__name__}: {error})") from error
    if not isinstance(backend, Backend):
        raise BackendError(
            f"its entry point gives a {type(backend).__name__}, not an xtrain.backends.Backend"
        )
    return backend


_used: dict[str, Backend] = {}


def used() -> list[Backend]:
    """The backends that this process has asked for."""
    return list(_used.values())


def reason(name: str) -> str | None:
    """Why the backend cannot be used here; None when it can."""
    try:
        return _load(name).runtime.unavailable_reason()
    except BackendError as error:
        return str(error)


def get(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendError: no such backend, or it cannot be used on this machine (the reason is given).
    """
    if name not in names():
        raise BackendError(unknown_name("backend", name, names()))
    if (why := reason(name)) is not None:
        raise BackendError(f"backend {name!r} cannot be used here: {why}")
    _used[name] = _load(name)
    return _used[name]


def available() -> dict[str, str | None]:
    """For each backend, None when it can be used here, else the reason why not."""
    return {name: reason(name) for name in names()}


def detect(name: str | None = None) -> Backend:
    """The backend to use: `name` (from the config), else the environment, else what the machine has.

    Environment: XTRAIN_BACKEND, then DS_ACCELERATOR. Installed plug-ins come before xtrain's own, and the host
    processor last.
    """
    if chosen := name or os.environ.get("XTRAIN_BACKEND"):
        return get(chosen)
    if accelerator := os.environ.get("DS_ACCELERATOR"):
        meant = _DS_NAMES.get(accelerator, (accelerator,))
        return get(next((one for one in meant if one in names() and reason(one) is None), meant[0]))
    for candidate in [*sorted(_plugins()), *_BUILTIN]:
        try:
            runtime = _load(candidate).runtime
        except BackendError as error:
            _tell_once(candidate, str(error))
            continue
        if runtime.unavailable_reason() is None and runtime.taken_unasked():
            return _load(candidate)
    return get("cpu")


def source(name: str) -> str:
    """Where a backend comes from: "xtrain", or the package (and its version) that offers it."""
    if name in _BUILTIN:
        return "xtrain"
    package = _plugins()[name].dist
    return f"{package.name} {package.version}" if package is not None else _plugins()[name].value


@cache
def _tell_once(name: str, why: str) -> None:
    log_dist(f"backend {name!r} is installed and cannot be used: {why}", ranks=[0], level=logging.WARNING)
