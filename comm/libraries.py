"""Which process-group libraries there are: torch's, those that packages register with it, and xtrain's own.

A library of xtrain's own is a package below xtrain.comm with NAME, its name in torch, as comm/mpi. It is found by
being there; it may answer `unavailable_reason()` and `version()`, and say in DEVICES for which device types it is (host
memory), and in STARTED_BY which program starts its ranks (any launcher).
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist

_ALWAYS_NAMED = ("gloo", "nccl")
_NOT_FOR_TRAINING = frozenset({"undefined", "fake", "threaded"})


@cache
def own() -> dict[str, ModuleType]:
    """xtrain's own libraries, by the name that `init_distributed` takes."""
    modules = {
        info.name: importlib.import_module(f"{__package__}.{info.name}")
        for info in pkgutil.iter_modules([str(Path(__file__).parent)])
        if info.ispkg
    }
    return {name: module for name, module in modules.items() if hasattr(module, "NAME")}


def names() -> list[str]:
    """All libraries that can be asked for; of torch's, gloo and nccl even where this build lacks them."""
    registered = {module.NAME for module in own().values()} - set(own())
    there = [
        name
        for name in dist.Backend.backend_list
        if name not in _NOT_FOR_TRAINING | registered and dist.is_backend_available(name)
    ]
    return list(dict.fromkeys([*_ALWAYS_NAMED, *own(), *there]))


def reason(name: str) -> str | None:
    """One sentence saying why no process group can be made with it here; None when it can."""
    if name in own():
        why = getattr(own()[name], "unavailable_reason", None)
        answer: str | None = None if why is None else why()
        return answer
    if dist.is_backend_available(name):
        return None
    return f"torch {torch.__version__} has no library {name!r}"


def devices(name: str) -> list[str]:
    """Device types whose tensors it moves."""
    if name in own():
        return list(getattr(own()[name], "DEVICES", ["cpu"]))
    return list(dist.Backend.backend_capability.get(name, ["cpu"]))


def started_by(name: str) -> str | None:
    """The only program that can start its ranks; None for any."""
    return getattr(own().get(name), "STARTED_BY", None)


def version(name: str) -> str | None:
    """Its version, where it is not simply torch's."""
    if name in own():
        tell = getattr(own()[name], "version", None)
        return None if tell is None else str(tell())
    if name == "nccl" and dist.is_nccl_available() and torch.cuda.is_available():
        return ".".join(map(str, torch.cuda.nccl.version()))
    return None
