"""Models that another engine trains: what xtrain.zero does for their parameters is that engine's affair.

An engine registers here when it is loaded, so that nothing in this folder needs to know it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from xtrain.config import XtrainConfig

_HOMES = {"deepspeed": "xtrain.deepspeed_engine.start"}
"""Where the engines are that a config may name (key `xtrain.engine`); importing the module registers it."""

Function = TypeVar("Function", bound=Callable[..., Any])


class Engine(Protocol):
    """What another engine does for the parameters that it has taken."""

    def zero_init(self, config: XtrainConfig, call: dict[str, Any]) -> Any:
        """Its `zero.Init`; `call` holds the arguments by name."""

    def gathered(
        self, params: list[Any], modifier_rank: int | None, fwd_module: nn.Module | None
    ) -> AbstractContextManager[Any]:
        """Its `GatheredParameters`, for those of the parameters that it has sharded."""

    def register_external(self, module: nn.Module, param: nn.Parameter) -> None:
        """Its `register_external_parameter`, if it has sharded the parameter."""

    def fragment_function(self, param: torch.Tensor, name: str) -> Callable[..., Any] | None:
        """Its function of that name (`safe_get_full_grad` and its kin), if it trains the parameter."""


_loaded: dict[str, Engine] = {}


def register(name: str, engine: Engine) -> None:
    """Make an engine known."""
    _loaded[name] = engine


def engine(name: str) -> Engine:
    """The engine that a config names, loaded if need be."""
    if name not in _loaded:
        importlib.import_module(_HOMES[name])
    return _loaded[name]


class Gathered(ExitStack):
    """A context in which the parameters of other engines are whole."""

    def __init__(self, params: list[Any], modifier_rank: int | None, fwd_module: nn.Module | None) -> None:
        super().__init__()
        self._contexts = [engine.gathered(params, modifier_rank, fwd_module) for engine in _loaded.values()]

    def __enter__(self) -> Gathered:
        for context in self._contexts:
            self.enter_context(context)
        return self


def register_external(module: nn.Module, param: nn.Parameter) -> None:
    """Tell the other engines of a parameter that another module uses."""
    for other in _loaded.values():
        other.register_external(module, param)


def follows_the_engine(function: Function) -> Function:
    """Let a function be that of the same name of the engine that trains the parameter.

    The function's first argument is a parameter, or a list of them.
    """

    @wraps(function)
    def chosen(param: Any, *args: Any, **kwargs: Any) -> Any:
        first = param[0] if isinstance(param, list | tuple) and param else param
        for other in _loaded.values() if isinstance(first, torch.Tensor) else ():
            if (theirs := other.fragment_function(first, function.__name__)) is not None:
                return theirs(param, *args, **kwargs)
        return function(param, *args, **kwargs)

    return cast(Function, chosen)
