"""The ways in: for this process, and for those that it starts. Imports no torch; what needs it waits."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from xtrain.base.errors import ConfigError
from xtrain.shims import alias, where
from xtrain.shims.after_import import Hooks
from xtrain.shims.patches import Patches

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

MODE_VARIABLE = "XTRAIN_SHIMS"
"""In the environment of a process that was started with shims: what its device shim is to be."""
MODES = ("auto", "on", "off")
START = Path(__file__).parent / "start"


class _State:
    """What is installed in this process."""

    def __init__(self) -> None:
        self.mode: str | None = None
        self.hooks, self.patches = Hooks(), Patches()
        self.device = False
        """Whether the device shim is active."""


_state = _State()


def _python_path(environ: Mapping[str, str]) -> list[str]:
    return [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def environment(mode: str, environ: MutableMapping[str, str]) -> None:
    """Let processes with this environment start with shims.

    Args:
        mode: of the device shim: "auto", "on" or "off".
    """
    root = Path(__file__).absolute().parents[2]
    given = [entry for entry in _python_path(environ) if entry != str(START)]
    # An installed xtrain is found anyway; one that this process has from its working folder would be lost.
    needed = [] if _is_installed() else [str(root)]
    environ["PYTHONPATH"] = os.pathsep.join([str(START), *needed, *given])
    environ[MODE_VARIABLE] = mode


def _is_installed() -> bool:
    """Whether another process of this Python finds xtrain from any folder."""
    editable = any(
        getattr(finder, "__module__", "").startswith("__editable___xtrain") for finder in sys.meta_path
    )
    elsewhere = [entry for entry in sys.path if entry and Path(entry).absolute() != Path.cwd()]
    return editable or PathFinder.find_spec("xtrain", elsewhere) is not None


def _remove_from_environment() -> None:
    entries = [entry for entry in _python_path(os.environ) if entry != str(START)]
    os.environ["PYTHONPATH"] = os.pathsep.join(entries)
    os.environ.pop(MODE_VARIABLE, None)


def install(device_shim: str = "auto") -> None:
    """From now on `import deepspeed` and `import apex` mean xtrain, and CUDA's names in torch the selected backend.

    Here, and in processes that this one starts. To be called before anything that imports them; a second call does
    nothing.

    Args:
        device_shim: "auto": torch.cuda and the like mean the selected backend where that is not CUDA or DCU, which they
            mean anyway; "on": the same, and it is an error where there is nothing to translate; "off": they stay.

    Raises:
        ConfigError: the real deepspeed or apex is imported already, or another mode is installed.
        BackendError: the backend asked for cannot be used here, or the device shim does not know it.
    """
    if device_shim not in MODES:
        raise ConfigError(f"device_shim is {device_shim!r}: choose one of {', '.join(MODES)}")
    if _state.mode is not None:
        if _state.mode != device_shim:
            raise ConfigError(
                f"xtrain.install(device_shim={device_shim!r}): it is installed already with {_state.mode!r}; call "
                "xtrain.uninstall() before"
            )
        return
    alias.install("deepspeed")
    alias.install(*alias.APEX, wanted=_apex_is_wanted)
    _state.mode = device_shim
    # A child's environment is made already, and Python's start is no place to look through folders again.
    if os.environ.get(MODE_VARIABLE) != device_shim or str(START) not in _python_path(os.environ):
        environment(device_shim, os.environ)
    where.install()
    if device_shim != "off":
        _state.hooks.add("torch", _torch_is_there)


def uninstall() -> None:
    """Undo `install`: imports mean what is installed, torch is as it was. Objects that were made stay what they are.

    On Ascend torch_npu's own translation cannot be taken back in a process.
    """
    alias.uninstall()
    _state.hooks.clear()
    _state.patches.undo()
    where.uninstall()
    if _state.mode is not None:
        _remove_from_environment()
    _state.mode, _state.device = None, False


def is_installed() -> bool:
    """Whether `install` has been called, and not undone."""
    return _state.mode is not None


def in_child() -> None:
    """Called at Python's start, in a process whose environment `environment` has made."""
    if mode := os.environ.get(MODE_VARIABLE):
        install(mode)


def _torch_is_there(torch: ModuleType) -> None:
    from xtrain.backends import registry
    from xtrain.shims import device

    backend = registry.detect()
    if device.is_needed(backend):
        device.activate(backend, _state.patches)
        _state.device = True
        for name in device.CHANGED:
            _state.hooks.add(name, lambda module: device.module_is_there(module, _state.patches))
    elif _state.mode == "on":
        raise ConfigError(
            f"the device shim is to be on, and backend {backend.name!r} is what torch.cuda means anyway: choose "
            "another backend (XTRAIN_BACKEND), or device shim auto"
        )


def _apex_is_wanted() -> bool:
    """Where NVIDIA's own is installed and can run, it is taken."""
    if "torch" not in sys.modules and _state.mode != "off":
        importlib.import_module("torch")
    return _state.device or PathFinder.find_spec("apex") is None
