"""Values in a torch file that is read without executing code from it: which ones, and who is to blame if not."""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import io
import pathlib
import pickle
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch


def make_defaultdict(factory: Any, items: dict[Any, Any]) -> defaultdict[Any, Any]:
    """A defaultdict as it stands in a file: torch's reader fills none."""
    return defaultdict(factory, items)


def make_deque(items: list[Any], maxlen: int | None) -> deque[Any]:
    """A deque as it stands in a file: torch's reader fills none."""
    return deque(items, maxlen)


_PLAIN = [bool, bytes, complex, dict, float, frozenset, int, list, range, set, slice, str, tuple]
_HOLDERS = [
    argparse.Namespace,  # Megatron keeps its `args`
    types.SimpleNamespace,
    Counter,
    OrderedDict,
    make_defaultdict,
    make_deque,
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    decimal.Decimal,
    fractions.Fraction,
    uuid.UUID,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    pathlib.WindowsPath,
    pathlib.PureWindowsPath,
]


def _of_numpy() -> list[Any]:
    """What numpy's arrays and scalars of every dtype are made with."""
    core = getattr(np, "_core", None) or np.core
    dtypes = {type(np.dtype(code)) for code in np.typecodes["All"]}
    return [np.ndarray, np.dtype, *dtypes, core.multiarray.scalar, core.multiarray._reconstruct]


_HARMLESS = [*_PLAIN, *_HOLDERS, *_of_numpy()]
"""Plain values and holders of values beyond torch's own list: making one of them does nothing else."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is defaultdict:
            return make_defaultdict, (value.default_factory, dict(value))
        if type(value) is deque:
            return make_deque, (list(value), value.maxlen)
        return NotImplemented


class _Pickling:
    """In the place of the module `pickle`."""

    Pickler = _Pickler


def safe_load(file: Path | IO[bytes]) -> Any:
    """`torch.load` on the host for numbers, strings, containers, tensors, numpy values, dates, paths and Namespaces."""
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(file, map_location="cpu", weights_only=True)


def safe_save(value: Any, path: Path, names: Mapping[str, str] | str) -> None:
    """`torch.save` of what `safe_load` reads.

    Args:
        names: what `value` is called in an error; of a dictionary, what each of its entries is called.

    Raises:
        ValueError: `value` holds something that could not be read back without executing code; says where.
        OSError: the file cannot be written.
    """
    try:
        torch.save(value, path, pickle_module=_Pickling)
        safe_load(path)
    except OSError:
        raise
    except Exception as error:
        parts = (
            [(names, value)] if isinstance(names, str) else [(names.get(k, k), v) for k, v in value.items()]
        )
        for name, part in parts:
            if (problem := _problem(part)) is not None:
                raise ValueError(_blame(part, name, problem, ())) from None
        raise OSError(f"{path} cannot be read back: {error}") from None  # each part can: so it is the file


def _problem(value: Any) -> str | None:
    """Why a value cannot be saved and read back, if there is more to say than that; None if it can."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer, pickle_module=_Pickling)
    except Exception as error:
        return f" ({error})"
    try:
        buffer.seek(0)
        safe_load(buffer)
    except Exception:  # torch's advice is to switch the safety off
        return ""
    return None


def _blame(value: Any, name: str, problem: str, above: tuple[int, ...]) -> str:
    """A sentence about the innermost part of a value that cannot be saved."""
    if id(value) not in above:
        for child_name, child in _children(value, name):
            if (inner := _problem(child)) is not None:
                return _blame(child, child_name, inner, (*above, id(value)))
    kind = type(value)
    called = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return (
        f"{name} is of class {called}, which cannot be saved so that loading executes no code: use numbers, strings, "
        f"lists, dictionaries, tensors, arrays, dates and paths{problem}"
    )


def _children(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What a container of a known kind holds, by the expression that leads there."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"a key of {name}", key
            yield f"{name}[{key!r:.80}]", item
    elif isinstance(value, (list, tuple, deque)):
        for index, item in enumerate(value):
            yield f"{name}[{index}]", item
    elif isinstance(value, (set, frozenset)):
        for item in value:
            yield f"an element of {name}", item
    elif isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        for key, item in vars(value).items():
            yield f"{name}.{key}", item
    if isinstance(value, defaultdict):
        yield f"{name}.default_factory", value.default_factory
