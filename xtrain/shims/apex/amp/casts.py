"""Casts of O1 around a script's own functions. They do nothing in other levels, as in apex."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from xtrain.shims.apex.amp._amp_state import _amp_state

_registered: list[tuple[Any, str, Callable[[Any], Any]]] = []


def cast(value: Any, dtype: torch.dtype) -> Any:
    """The value with all floating-point tensors in it, in dictionaries, lists and tuples too, in a dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        inner = {key: cast(part, dtype) for key, part in value.items()}
        if type(value) is dict:
            return inner
        result = value.copy()  # such as an output of Transformers, which is a dictionary with attributes
        for key, part in inner.items():
            result[key] = part
        return result
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(cast(part, dtype) for part in value))
    if isinstance(value, list | tuple):
        return type(value)(cast(part, dtype) for part in value)
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _active() -> bool:
    options = _amp_state.opt_properties
    return options is not None and options.enabled and options.patch_torch_functions and _amp_state.casting


def _casting(function: Callable[..., Any], choose: Callable[[list[torch.Tensor]], torch.dtype]) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        tensors = [given for given in _tensors([args, kwargs]) if given.is_floating_point()]
        if not _active() or not tensors:
            return function(*args, **kwargs)
        dtype = choose(tensors)
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*cast(args, dtype), **cast(kwargs, dtype))

    return wrapper


def half_function(fn: Callable[..., Any]) -> Any:
    """A function that gets floating-point tensors in float16 in O1."""
    return _casting(fn, lambda tensors: torch.float16)


def float_function(fn: Callable[..., Any]) -> Any:
    """A function that gets floating-point tensors in float32 in O1."""
    return _casting(fn, lambda tensors: torch.float32)


def promote_function(fn: Callable[..., Any]) -> Any:
    """A function that gets all floating-point tensors in the widest of their dtypes in O1."""
    return _casting(
        fn, lambda tensors: functools.reduce(torch.promote_types, [given.dtype for given in tensors])
    )


def _register(module: Any, name: str, decorate: Callable[[Any], Any]) -> None:
    if not hasattr(module, name):
        raise ValueError(f"No function named {name} in module {module}.")
    _registered.append((module, name, decorate))


def register_half_function(module: Any, name: str) -> None:
    """From `initialize` on, `module.name` is a `half_function`."""
    _register(module, name, half_function)


def register_float_function(module: Any, name: str) -> None:
    """From `initialize` on, `module.name` is a `float_function`."""
    _register(module, name, float_function)


def register_promote_function(module: Any, name: str) -> None:
    """From `initialize` on, `module.name` is a `promote_function`."""
    _register(module, name, promote_function)


def apply_registered() -> None:
    """Wrap the registered functions, each once."""
    for module, name, decorate in _registered:
        setattr(module, name, decorate(getattr(module, name)))
    _registered.clear()


@contextlib.contextmanager
def disable_casts() -> Iterator[None]:
    """No casts of O1 within."""
    before, _amp_state.casting = _amp_state.casting, False
    try:
        yield
    finally:
        _amp_state.casting = before
