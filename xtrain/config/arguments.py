"""Checking a dictionary of constructor arguments from the config against the constructor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from xtrain.errors import ConfigError, nearest

T = TypeVar("T")


def construct(factory: Callable[..., T], first: Any, params: Mapping[str, Any], key: str) -> T:
    """`factory(first, **params)`, every mistake in `params` told in terms of the config key `key`.

    Raises:
        ConfigError: an entry that the constructor does not take, a required one that is missing, or a
            value that the constructor refuses.
    """
    signature = list(inspect.signature(factory).parameters.values())[1:]
    valid = [parameter.name for parameter in signature]
    for entry in params:
        if entry not in valid:
            close = nearest(entry, valid)
            hint = f"did you mean {close!r}?" if close else f"choose from {', '.join(valid)}"
            raise ConfigError(f"config key {key!r} has an unknown entry {entry!r}: {hint}")
    missing = [p.name for p in signature if p.default is inspect.Parameter.empty and p.name not in params]
    if missing:
        raise ConfigError(f"config key {key!r} lacks {', '.join(missing)}")
    try:
        return factory(first, **params)
    except (TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"config key {key!r} is wrong: {error}") from None
