"""The import system, for names of DeepSpeed: what missing.py refuses is explained, what stand_ins.py has is found."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from xtrain.base import stand_ins
from xtrain.base.missing import MissingModuleError, MissingNameError, find, name_error


def _explaining(module: ModuleType) -> Callable[[str], Any]:
    """A `__getattr__` for the module: what its own one finds, else the table's error for a name of DeepSpeed's."""
    own: Callable[[str], Any] | None = vars(module).get("__getattr__")
    path = module.__name__.partition(".")[2]

    def find_attribute(name: str) -> Any:
        unknown = AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        if own is not None:
            try:
                return own(name)
            except AttributeError as error:
                unknown = error
        stand_in = stand_ins.get(f"{path}.{name}")
        if stand_in is not None:
            return stand_in
        if isinstance(unknown, MissingNameError):
            raise unknown
        raise name_error(f"{path}.{name}") or unknown

    return find_attribute


class _Loader(SourceFileLoader):
    """Loads a module at one of DeepSpeed's paths, and makes it explain the names that only DeepSpeed has."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        # `from MODULE import NAME` asks the import system, and so `Finder`, about packages only: it would say
        # "cannot import name". An empty path makes the module one, with nothing in it.
        module.__path__ = getattr(module, "__path__", [])
        vars(module)["__getattr__"] = _explaining(module)


class Explainer:
    """The first finder of the import system: finds xtrain's modules as ever, and has those that share a path with
    DeepSpeed's loaded by `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, below = fullname.partition(".")
        if package != "xtrain" or not below or find(f"{below}._") is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _StandInLoader:
    """Makes a module whose names all stand for something that is not there."""

    def create_module(self, spec: ModuleSpec) -> None:
        """Python's own kind of module."""

    def exec_module(self, module: ModuleType) -> None:
        entry = find(module.__name__.partition(".")[2])
        module.__doc__ = f"Not there yet ({entry.feature}): {entry.instead}." if entry else None
        vars(module)["__getattr__"] = _explaining(module)


class Finder:
    """The last finder of the import system: explains modules of DeepSpeed that no other one has found.

    It also serves `from MODULE import NAME`, which looks for a module when there is no such attribute.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, below = fullname.partition(".")
        entry = find(below) if package == "xtrain" and below else None
        if stand_ins.is_module(below):
            return ModuleSpec(fullname, _StandInLoader(), is_package=True)  # type: ignore[arg-type]
        if entry is not None and not below.rpartition(".")[2].startswith("__"):
            raise MissingModuleError(f"{below} ({entry.feature})", entry.instead)
        return None


def install() -> None:
    """Add the finders, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Explainer())
        sys.meta_path.append(Finder())
