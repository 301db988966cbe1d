"""Names of parameters, buffers and modules as if nothing of the model had been compiled.

`torch.compile(module)` returns a module that holds the given one as `_orig_mod`, a part of every name below it. A
checkpoint must not depend on that: what a compiled model has saved, the plain one loads, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

WRAPPED = "_orig_mod"
"""Under which torch.compile's module holds the given one."""


def plain(name: str) -> str:
    """A name without what torch.compile has put into it."""
    return ".".join(part for part in name.split(".") if part != WRAPPED) if WRAPPED in name else name


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that was given to torch.compile; another module itself."""
    while (inner := module._modules.get(WRAPPED)) is not None:
        module = inner
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, or one in it, was given to torch.compile or has been told to compile itself."""
    return any(WRAPPED in part._modules or part._compiled_call_impl is not None for part in module.modules())


def parameters(module: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """`module.named_parameters()`."""
    for name, param in module.named_parameters(remove_duplicate=remove_duplicate):
        yield plain(name), param


def buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """`module.named_buffers()`."""
    for name, buffer in module.named_buffers():
        yield plain(name), buffer


def modules(module: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`module.named_modules()`, without those that torch.compile has put around others."""
    for name, part in module.named_modules(remove_duplicate=remove_duplicate):
        if WRAPPED not in part._modules:
            yield plain(name), part


def state_dict(module: nn.Module, keep_vars: bool = False) -> dict[str, Any]:
    """`module.state_dict()`."""
    return {plain(name): value for name, value in module.state_dict(keep_vars=keep_vars).items()}


def load_state_dict(module: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """`module.load_state_dict(state, strict=False)`.

    Returns:
        Names that are missing, and names that the module does not know.
    """
    paths = {plain(name): name for name, _ in module.named_modules(remove_duplicate=False)}

    def own(name: str) -> str:
        """The name by which the module knows the entry: below the deepest of its parts that it begins with."""
        parts = plain(name).split(".")
        for count in range(len(parts), -1, -1):
            path = ".".join(parts[:count])
            if path in paths:
                return ".".join(part for part in (paths[path], *parts[count:]) if part)
        return name

    missing, unexpected = module.load_state_dict({own(n): value for n, value in state.items()}, strict=False)
    return [plain(name) for name in missing], [plain(name) for name in unexpected]
