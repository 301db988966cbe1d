"""Names of packages that xtrain answers to: `deepspeed`, `apex`, `amp_C` and `apex_C`.

A module below such a name is xtrain's own module, not a second copy. Only the package `deepspeed` itself is an object
of its own: its version is that of the DeepSpeed that it stands for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.base.missing import API_VERSION

APEX = {
    "apex": "xtrain.shims.apex",
    "amp_C": "xtrain.shims.apex.amp_C",
    "apex_C": "xtrain.shims.apex.apex_C",
}
STANDS_FOR = {"deepspeed": "xtrain", **APEX}
"""Package and module names, and xtrain's module for each."""
_VERSIONS = {"deepspeed": API_VERSION, "apex": "0.1"}
"""What `importlib.metadata` says of them."""


class _DeepSpeed(ModuleType):
    """The package `deepspeed`: xtrain's names, and DeepSpeed's version."""

    __version__ = version = API_VERSION
    __version_major__, __version_minor__, __version_patch__ = map(int, API_VERSION.split("."))

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules["xtrain"], name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(sys.modules["xtrain"])})


class _Loader:
    """Gives a module of xtrain another name; it is not loaded a second time."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_ours(spec.name))
        if spec.name == "deepspeed":
            return _DeepSpeed(spec.name, module.__doc__)
        self._spec = module.__spec__
        return module

    def get_code(self, name: str) -> CodeType | None:
        """For `python -m deepspeed.launcher.runner`, which runs the code as `__main__`."""
        spec = importlib.util.find_spec(_ours(name))
        get_code = getattr(spec.loader, "get_code", None) if spec is not None else None
        return get_code(_ours(name)) if get_code is not None else None

    def exec_module(self, module: ModuleType) -> None:
        if isinstance(module, _DeepSpeed):
            module.__path__ = []  # finders ask for it; modules below come from this file's
            module.__file__ = sys.modules["xtrain"].__file__
        else:
            module.__spec__ = self._spec  # the import system has put the other name's there


def _ours(name: str) -> str:
    package, dot, below = name.partition(".")
    return f"{STANDS_FOR[package]}{dot}{below}"


def _metadata(name: str) -> Any:
    """What `importlib.metadata` says about a distribution. Imported by who asks: it makes Python's start slow."""
    from importlib.metadata import Distribution

    class Metadata(Distribution):
        def read_text(self, filename: str) -> str | None:
            if filename not in ("METADATA", "PKG-INFO"):
                return None
            return f"Metadata-Version: 2.1\nName: {name}\nVersion: {_VERSIONS[name]}\nSummary: xtrain under this name\n"

        def locate_file(self, path: Any) -> Any:
            return Path(path)

    return Metadata()


class _Finder:
    """The first finder of the import system: these packages, and all below them, are xtrain's modules."""

    def __init__(self) -> None:
        self.names: dict[str, Callable[[], bool]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        wanted = self.names.get(fullname.partition(".")[0])
        if wanted is None or not wanted():
            return None
        found = importlib.util.find_spec(_ours(fullname))
        if found is None:
            raise ModuleNotFoundError(f"xtrain has no module {_ours(fullname)!r}", name=fullname)
        is_package = found.submodule_search_locations is not None
        return ModuleSpec(fullname, _Loader(), origin=found.origin, is_package=is_package)  # type: ignore[arg-type]

    def find_distributions(self, context: Any = None) -> list[Any]:
        """For `importlib.metadata`, whose context has the name that is looked for; None: all."""
        name = context.name if context is not None else None
        return [_metadata(name)] if name in self.names and name in _VERSIONS else []


_finder = _Finder()


def is_ours(module: ModuleType) -> bool:
    """Whether what is imported under one of the names is xtrain."""
    return isinstance(module, _DeepSpeed) or module.__name__.partition(".")[0] == "xtrain"


def _always() -> bool:
    return True


def install(*names: str, wanted: Callable[[], bool] = _always) -> None:
    """From now on these names mean xtrain, whether packages of these names are installed or not.

    Args:
        wanted: asked at each import; False leaves it to the package that is installed.

    Raises:
        ConfigError: the real one is imported already.
    """
    for name in names:
        loaded = sys.modules.get(name)
        if loaded is not None and not is_ours(loaded):
            raise ConfigError(
                f"{name} is imported already (from {getattr(loaded, '__file__', None)}): start the script by "
                "`xtrain run`, or let xtrain.install() or `import xtrain.as_deepspeed` come before anything that "
                f"imports {name}"
            )
    _finder.names.update(dict.fromkeys(names, wanted))
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    if "deepspeed" in names:
        importlib.import_module("deepspeed")


def uninstall() -> None:
    """The names mean again what is installed under them; modules that scripts hold stay xtrain's."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name in list(sys.modules):
        if name.partition(".")[0] in _finder.names and is_ours(sys.modules[name]):
            del sys.modules[name]
    _finder.names.clear()
