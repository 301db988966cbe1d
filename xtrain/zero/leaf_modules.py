"""Marks modules that ZeRO stage 3 gathers as one piece: all parameters below them when they are entered.

For modules whose parts run in an order that changes, such as mixtures of experts. The mark is the
attribute `_z3_leaf` of the module, as in DeepSpeed; set it before `initialize`, or in the config.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.config.zero import LEAF_MODULE_CLASSES, LeafModuleConfig

__all__ = [
    "get_z3_leaf_modules",
    "set_z3_leaf_module",
    "set_z3_leaf_modules",
    "set_z3_leaf_modules_by_name",
    "set_z3_leaf_modules_by_suffix",
    "unset_z3_leaf_modules",
    "z3_leaf_module",
    "z3_leaf_parameter",
]


def z3_leaf_module(model: nn.Module) -> bool:
    """Whether the module itself is marked."""
    return bool(getattr(model, "_z3_leaf", False))


def z3_leaf_parameter(model: torch.nn.Parameter) -> bool:
    """Whether the parameter is below a marked module."""
    return hasattr(model, "ds_z3_leaf_module")


def get_z3_leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The marked modules in `model`."""
    return [module for module in model.modules() if z3_leaf_module(module)]


def set_z3_leaf_module(model: nn.Module, flag: bool) -> None:
    """Mark the module (and its parameters, for `z3_leaf_parameter`), or take the mark away."""
    model._z3_leaf = flag  # type: ignore[assignment]
    for param in model.parameters():
        if flag:
            param.ds_z3_leaf_module = model  # type: ignore[attr-defined]
        elif getattr(param, "ds_z3_leaf_module", None) is model:
            del param.ds_z3_leaf_module  # type: ignore[attr-defined]


def set_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Mark all modules of the given classes (types, or names with or without the package).

    Returns:
        The modules that were marked.

    Raises:
        ConfigError: there is none, or an entry is neither a type nor a name.
    """
    return _set_by_class(model, leaf_module_classes, True, raise_if_not_found)


def unset_z3_leaf_modules(
    model: nn.Module, leaf_module_classes: Sequence[type | str], raise_if_not_found: bool = True
) -> list[nn.Module]:
    """Take away what `set_z3_leaf_modules` did; returns and raises as it does."""
    return _set_by_class(model, leaf_module_classes, False, raise_if_not_found)


def set_z3_leaf_modules_by_name(
    model: nn.Module, module_names: Sequence[str], flag: bool = True, raise_if_not_found: bool = True
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by their names in `named_modules()`; returns them, and the names that were not found.

    Raises:
        ConfigError: a name was not found, and `raise_if_not_found`.
    """
    return _set_by_word(model, module_names, flag, raise_if_not_found, lambda name, word: name == word)


def set_z3_leaf_modules_by_suffix(
    model: nn.Module,
    module_name_suffixes: Sequence[str],
    flag: bool = True,
    raise_if_not_found: bool = True,
) -> tuple[list[nn.Module], list[str]]:
    """Mark modules by the ends of their names; returns and raises as `set_z3_leaf_modules_by_name`."""
    return _set_by_word(model, module_name_suffixes, flag, raise_if_not_found, str.endswith)


def apply_leaf_modules(model: nn.Module, section: LeafModuleConfig) -> list[nn.Module]:
    """Mark what the config's section `leaf_module` names; returns what was marked.

    Names of the script's own that fit nothing are told; DeepSpeed's default classes need not be there.
    """
    marked = []
    for name in section.classes:
        found = set_z3_leaf_modules(model, [name], raise_if_not_found=False)
        marked += found
        if not found and name not in LEAF_MODULE_CLASSES:
            _tell_unfound("classes", name)
    by_word = (("names", set_z3_leaf_modules_by_name), ("name_suffixes", set_z3_leaf_modules_by_suffix))
    for key, mark in by_word:
        found, missing = mark(model, getattr(section, key), raise_if_not_found=False)
        marked += found
        for name in missing:
            _tell_unfound(key, name)
    return list(dict.fromkeys(marked))


def _tell_unfound(key: str, name: str) -> None:
    log_dist(
        f"config key 'zero_optimization.leaf_module.{key}': no module of the model is {name!r}",
        ranks=[0],
        level=logging.WARNING,
    )


def _is_one_of(module: nn.Module, classes: Sequence[type | str]) -> bool:
    kind = type(module)
    names = (kind.__name__, f"{kind.__module__}.{kind.__qualname__}")
    return any(entry in names if isinstance(entry, str) else isinstance(module, entry) for entry in classes)


def _set_by_class(
    model: nn.Module, classes: Sequence[type | str], flag: bool, raise_if_not_found: bool
) -> list[nn.Module]:
    if not all(isinstance(entry, (type, str)) for entry in classes):
        raise ConfigError(f"leaf_module_classes must be types or names of classes, got {list(classes)}")
    found = [module for module in model.modules() if _is_one_of(module, classes)]
    if not found and raise_if_not_found:
        names = [entry if isinstance(entry, str) else entry.__name__ for entry in classes]
        raise ConfigError(f"no module of class {' or '.join(names)} in {type(model).__name__}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return found


def _set_by_word(
    model: nn.Module,
    words: Sequence[str],
    flag: bool,
    raise_if_not_found: bool,
    matches: Callable[[str, str], bool],
) -> tuple[list[nn.Module], list[str]]:
    found: dict[nn.Module, None] = {}
    missing = []
    for word in words:
        hits = [module for name, module in model.named_modules() if matches(name, word)]
        found.update(dict.fromkeys(hits))
        if not hits:
            missing.append(word)
    if missing and raise_if_not_found:
        raise ConfigError(f"no module of {type(model).__name__} is named {' or '.join(missing)}")
    for module in found:
        set_z3_leaf_module(module, flag)
    return list(found), missing
