"""Explains names of apex that the shim does not have (xtrain/shims/apex_table.py): asked by the import system.

An ImportError is right for all of them: scripts that can do without apex's part go on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from xtrain.base import finders
from xtrain.base.missing import MissingModuleError, MissingNameError
from xtrain.base.stand_ins import refusing_class
from xtrain.shims.apex_table import REFUSED, find

PACKAGE = "xtrain.shims.apex"


def attributes(package: str) -> Callable[[str], Any]:
    """A `__getattr__` for one of the shim's packages: explains names that the table knows."""

    def explain(name: str) -> Any:
        path = f"{package}.{name}".removeprefix(f"{PACKAGE}.")
        entry = None if name.startswith("_") else find(path)
        if entry is None:
            raise AttributeError(f"module 'apex{package[len(PACKAGE) :]}' has no attribute {name!r}")
        raise MissingNameError(f"apex.{path} ({entry[0]})", entry[1])

    return explain


def refused_class(path: str) -> Any:
    """A class whose constructor says that it is not there; for names that scripts import without using them."""
    feature, instead = REFUSED[path]
    module, _, name = f"{PACKAGE}.{path}".rpartition(".")
    return refusing_class(name, module, f"apex.{path} ({feature})", instead)


class Finder:
    """The last finder of the import system: explains apex's modules that are not there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        below = fullname.removeprefix(f"{PACKAGE}.")
        entry = find(below) if below != fullname else None
        if entry is not None:
            raise MissingModuleError(f"apex.{below} ({entry[0]})", entry[1])
        return None


def install() -> None:
    """Add the finder, once; before the one that explains DeepSpeed's names, which would take some for its own."""
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    places = [place for place, finder in enumerate(sys.meta_path) if isinstance(finder, finders.Finder)]
    sys.meta_path.insert(places[0] if places else len(sys.meta_path), Finder())
