"""Attributes of packages: `xtrain.runtime.lr_schedules` without an `import` of it, as after `import deepspeed`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from typing import Any

from xtrain.base import missing


def attributes(package: str) -> Callable[[str], Any]:
    """A `__getattr__` for the package: loads its modules when they are named, explains names of DeepSpeed's."""

    def find(name: str) -> Any:
        path = f"{package}.{name}"
        if not name.startswith("_") and PathFinder.find_spec(path, sys.modules[package].__path__):
            return importlib.import_module(path)
        raise missing.name_error(path.removeprefix("xtrain.")) or AttributeError(
            f"module {package!r} has no attribute {name!r}"
        )

    return find
