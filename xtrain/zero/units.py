"""Dividing a model into module groups, whose parameters ZeRO stage 3 gathers and releases together.

Only the division is here; what happens to a group is in gather.py.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from xtrain.zero.home import full_shape

MAX_ELEMENTS = 250_000_000
"""A larger module is divided into its children, down to single layers."""
MIN_BLOCKS = 8
"""A module that has lists of blocks itself is one group only if it is at most this part of the model."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class ModuleGroup:
    """`params` belong to `module` or to its descendants; while `module` runs they are whole."""

    name: str
    module: nn.Module
    params: tuple[nn.Parameter, ...]


class _Divider:
    def __init__(self, root: nn.Module, wanted: Collection[nn.Parameter]) -> None:
        self._left = dict.fromkeys(param for param in root.parameters() if param in wanted)
        self._total = sum(full_shape(param).numel() for param in self._left)
        self.groups: list[ModuleGroup] = []

    def _take(self, name: str, module: nn.Module, recurse: bool) -> None:
        """A parameter that several modules share belongs to the first of them."""
        params = tuple(p for p in module.parameters(recurse) if p in self._left)
        for param in params:
            del self._left[param]
        if params:
            self.groups.append(ModuleGroup(name, module, params))

    def _is_one(self, module: nn.Module, is_block: bool) -> bool:
        size = sum(full_shape(param).numel() for param in module.parameters() if param in self._left)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or size > MAX_ELEMENTS:
            return False
        has_lists = any(isinstance(child, _CONTAINERS) for child in module.modules())
        return not has_lists or (is_block and size * MIN_BLOCKS <= self._total)

    def walk(self, name: str, module: nn.Module, is_block: bool) -> None:
        leaf = getattr(module, "_z3_leaf", False)
        if leaf or (name and self._is_one(module, is_block)):
            self._take(name, module, recurse=True)
            return
        self._take(name, module, recurse=False)
        for child_name, child in module.named_children():
            inside = f"{name}.{child_name}" if name else child_name
            self.walk(inside, child, isinstance(module, _CONTAINERS))


def divide(root: nn.Module, wanted: Collection[nn.Parameter]) -> list[ModuleGroup]:
    """The module groups of a model, in order of registration; each wanted parameter is in one of them.

    Elements of lists (`ModuleList`, `Sequential`), which is what the blocks of a model are, make one
    group each unless they are large; outside of lists every subtree without lists makes one, and what a
    module with children holds itself. A module marked as a leaf (`utils.set_z3_leaf_modules`) is never
    divided.

    Args:
        wanted: the parameters to divide; others are ignored.
    """
    divider = _Divider(root, wanted)
    divider.walk("", root, False)
    return divider.groups
