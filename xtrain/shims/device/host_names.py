"""Puts the host's functions in the place of torch.cuda's."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

import torch
import torch.cuda.comm
import torch.cuda.nccl
import torch.cuda.nvtx

from xtrain.backends.backend import Backend
from xtrain.base.errors import NotImplementedYetError
from xtrain.shims.cuda_names import REFUSED, TENSOR_TYPES
from xtrain.shims.device.host_cuda import HostCuda
from xtrain.shims.patches import Patches, asked_by_torch

_INNER = ("torch.cuda.memory", "torch.cuda.random", "torch.cuda.streams", "torch.cuda._utils")
"""Modules that scripts import torch.cuda's functions from, too."""


class _RefusedModule(ModuleType):
    """A module of torch.cuda without a meaning here; torch's own code gets the real one."""

    def __init__(self, real: ModuleType, instead: str) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(_real=real, _instead=instead)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or asked_by_torch():
            return getattr(self._real, name)
        raise NotImplementedYetError(f"{self.__name__}.{name} on this backend", self._instead)


def _refused(name: str, real: Any, instead: str) -> Any:
    if isinstance(real, ModuleType):
        return _RefusedModule(real, instead)
    feature = f"torch.cuda.{name} on this backend"

    if isinstance(real, type):

        def __new__(cls: Any, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedYetError(feature, instead)

        return type(name, (), {"__new__": __new__, "__module__": "torch.cuda"})

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedYetError(feature, instead)

    # torch's compiler looks at attributes of some of them when it is imported.
    return functools.wraps(real)(refuse) if callable(real) else refuse


class _Ranges:
    """torch.cuda.nvtx: ranges that torch's profiler shows."""

    def __init__(self) -> None:
        self._open: list[Any] = []

    def range_push(self, msg: str, **kwargs: Any) -> int:
        """Open a range; how many are open around it."""
        block = torch.profiler.record_function(msg)
        block.__enter__()
        self._open.append(block)
        return len(self._open) - 1

    def range_pop(self) -> int:
        """Close the last one; how many are open around it, -1 where there was none."""
        if self._open:
            self._open.pop().__exit__(None, None, None)
            return len(self._open)
        return -1

    def mark(self, msg: str) -> None:
        """A range without a length."""
        with torch.profiler.record_function(msg):
            return

    def range(self, msg: str, *args: Any, **kwargs: Any) -> Any:
        """A range as a context or a decorator."""
        return torch.profiler.record_function(msg.format(*args, **kwargs))


def implemented() -> list[str]:
    """Names of torch.cuda that host_cuda.py has."""
    dunder = [name for name in vars(HostCuda) if name.startswith("__")]
    return sorted(set(vars(HostCuda)) - set(dunder) - {"current"})


def replace(patches: Patches, backend: Backend) -> None:
    """torch.cuda, and the modules in it, answer for the host."""
    host = HostCuda(backend)
    HostCuda.current = 0
    new: dict[str, Any] = {name: getattr(host, name) for name in implemented()}
    new |= {name: getattr(torch, name) for name in TENSOR_TYPES}
    for name, instead in REFUSED.items():
        if hasattr(torch.cuda, name):
            new[name] = _refused(name, getattr(torch.cuda, name), instead)
    for name, value in new.items():
        patches.set(torch.cuda, name, value)
        for module in (sys.modules[inner] for inner in _INNER):
            if name in vars(module):
                patches.set(module, name, value)
    ranges = _Ranges()
    for name in ("range_push", "range_pop", "mark", "range"):
        patches.set(torch.cuda.nvtx, name, getattr(ranges, name))
