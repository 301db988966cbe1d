"""Lets xtrain answer to the name `deepspeed`, for libraries that import DeepSpeed themselves.

`import xtrain as deepspeed` is enough for a script of one's own. Hugging Face's Trainer and Accelerate import
`deepspeed`, and ask the installed packages for its version: for them `import xtrain.as_deepspeed` comes first.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from xtrain.base.errors import ConfigError

NAME = "deepspeed"
API_VERSION = "0.19.8"
"""Version of DeepSpeed whose names docs/compat.md compares with."""


class _Metadata(Distribution):
    """What `importlib.metadata` says about the distribution `deepspeed`."""

    def read_text(self, filename: str) -> str | None:
        if filename not in ("METADATA", "PKG-INFO"):
            return None
        return (
            f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {API_VERSION}\nSummary: xtrain under this name\n"
        )

    def locate_file(self, path: Any) -> Any:
        return Path(path)


class _Loader:
    """Gives a module of xtrain another name; it is not loaded a second time."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_ours(spec.name))
        self._spec = module.__spec__
        return module

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m deepspeed.launcher.runner`, which runs the code as `__main__`."""
        spec = importlib.util.find_spec(_ours(name))
        return spec.loader.get_code(_ours(name)) if spec and isinstance(spec.loader, InspectLoader) else None

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the other name's there


def _ours(name: str) -> str:
    return f"xtrain{name[len(NAME) :]}"


class _Finder(DistributionFinder):
    """The first finder of the import system: `deepspeed` and all below it are xtrain's modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        found = importlib.util.find_spec(_ours(fullname))
        if found is None:
            raise ModuleNotFoundError(f"xtrain has no module {_ours(fullname)!r}", name=fullname)
        is_package = found.submodule_search_locations is not None
        return ModuleSpec(fullname, _Loader(), origin=found.origin, is_package=is_package)  # type: ignore[arg-type]

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterable[Distribution]:
        return [_Metadata()] if context is not None and context.name == NAME else []


def install() -> None:
    """From now on `import deepspeed` finds xtrain, whether DeepSpeed is installed or not. A second call does nothing.

    Raises:
        ConfigError: the real DeepSpeed is imported already.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    loaded = sys.modules.get(NAME)
    if loaded is not None and loaded is not sys.modules["xtrain"]:
        raise ConfigError(
            f"deepspeed is imported already (from {getattr(loaded, '__file__', None)}): "
            "import xtrain.as_deepspeed first, before any library that imports deepspeed"
        )
    sys.meta_path.insert(0, _Finder())
    importlib.import_module(NAME)
