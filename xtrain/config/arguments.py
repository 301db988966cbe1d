"""Checking a dictionary of constructor arguments from the config against the constructor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from xtrain.base.errors import ConfigError, nearest

T = TypeVar("T")

_SAID = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a string",
    NoneType: "null",
}


def _choices(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type, as JSON writes it: lists stand for tuples, 1 and 0 for true and false."""
    if len(_choices(hint)) > 1:
        return any(_fits(value, choice) for choice in _choices(hint))
    if hint is bool:
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, Real) and not isinstance(value, bool) and _finite(value)
    origin = get_origin(hint)
    if origin is None:
        return not isinstance(hint, type) or isinstance(value, hint)
    if not isinstance(origin, type) or not issubclass(origin, Sequence):
        return True
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    inner = get_args(hint)
    if origin is tuple and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return all(_fits(item, inner[0]) for item in value)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _said(hint: Any) -> str:
    """The type in words. What JSON cannot write, such as a tensor, is left out."""
    if len(_choices(hint)) > 1:
        words = [_said(choice) for choice in _choices(hint)]
        return " or ".join(dict.fromkeys(word for word in words if word))
    if isinstance(hint, type) and hint in _SAID:
        return _SAID[hint]
    inner = get_args(hint)
    if not inner:
        return ""
    fixed = get_origin(hint) is tuple and inner[-1] is not Ellipsis
    length = {2: "two ", 3: "three "}.get(len(inner), f"{len(inner)} ") if fixed else ""
    numbers = all({int, float} & set(_choices(item)) for item in inner if item is not Ellipsis)
    return f"a list of {length}{'numbers' if numbers else 'values'}"


def shown(value: Any) -> str:
    """A value as it is written in a sentence: on one line, and not longer than that."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print very long integers
        return "a number of thousands of digits"
    except RecursionError:
        return "nested too deep to show"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_value(value: Any, hint: Any, key: str) -> None:
    """Refuse a value that is not of the type.

    Raises:
        ConfigError: says what the value is and what it must be.
    """
    if _fits(value, hint):
        return
    wanted = _said(hint) or str(hint)
    if isinstance(value, Real) and not isinstance(value, bool) and not _finite(value):
        wanted = wanted.replace("a number", "a finite number")
    advice = ""
    if isinstance(value, str) and {int, float} & set(_choices(hint)) and _reads_as_number(value):
        advice = ", written without quotation marks"
    raise ConfigError(f"config key {key!r} is {shown(value)}: it must be {wanted}{advice}")


def _reads_as_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """Types of the arguments; none where the annotations cannot be evaluated."""
    try:
        return get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except (NameError, TypeError):
        return {}


def construct(factory: Callable[..., T], first: Any, params: Mapping[str, Any], key: str) -> T:
    """`factory(first, **params)`, every mistake in `params` told in terms of the config key `key`.

    Raises:
        ConfigError: an entry that the constructor does not take, a required one that is missing, a value of
            another type, or one that the constructor refuses.
    """
    signature = list(inspect.signature(factory).parameters.values())[1:]
    valid = [parameter.name for parameter in signature]
    hints = _hints(factory)
    for entry, value in params.items():
        if entry not in valid:
            close = nearest(entry, valid)
            hint = f"did you mean {close!r}?" if close else f"choose from {', '.join(valid)}"
            raise ConfigError(f"config key {key!r} has an unknown entry {entry!r}: {hint}")
        check_value(value, hints.get(entry, Any), f"{key}.{entry}")
    missing = [p.name for p in signature if p.default is inspect.Parameter.empty and p.name not in params]
    if missing:
        raise ConfigError(f"config key {key!r} lacks {', '.join(missing)}")
    try:
        return factory(first, **params)
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise ConfigError(f"config key {key!r} is wrong: {error}") from None
