"""What may be in client_state: read back equal, and of the same class, by a reader that runs no code."""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import os
import pickle
import random
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch

import xtrain
from tests import training
from xtrain.base.errors import CheckpointError
from xtrain.checkpoint.safe import safe_load, safe_save

UTC = datetime.UTC
VALUES: dict[str, Any] = {
    "numpy's random state": np.random.RandomState(3).get_state(),
    "a numpy generator's state": np.random.default_rng(3).bit_generator.state,
    "python's random state": random.Random(3).getstate(),
    "torch's random state": torch.Generator().get_state(),
    "path": Path("a/b"),
    "pure paths": [PurePosixPath("a/b"), PureWindowsPath("c:/d")],
    "datetime": datetime.datetime(2026, 1, 2, 3, 4, 5, 6),
    "datetimes with zones": [
        datetime.datetime(2026, 1, 2, tzinfo=UTC),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=8), "CST")),
    ],
    "date, time, delta": (datetime.date(2026, 1, 2), datetime.time(1, 2), datetime.timedelta(1, 2, 3)),
    "defaultdict": defaultdict(list, {1: [2], "x": [{}]}),
    "nested": {"a": [defaultdict(int, {1: 2}), deque([defaultdict(set, {3: {4}})], 5)]},
    "defaultdict without factory": defaultdict(None, {1: 2}),
    "OrderedDict": OrderedDict(b=1, a=2),
    "Counter": Counter("abca"),
    "deque": deque([1, 2], maxlen=3),
    "sets": [{1, "a"}, frozenset({(1, 2)})],
    "namespaces": [argparse.Namespace(lr=0.1, sub=argparse.Namespace(a=[1])), types.SimpleNamespace(a=1)],
    "numbers": [True, 2**200, -(2**70), 1 + 2j, decimal.Decimal("1.5"), fractions.Fraction(1, 3)],
    "rest": [None, b"ab", bytearray(b"x"), range(3), slice(1, 2), uuid.UUID(int=5)],
    "of torch": [torch.Size([1, 2]), torch.bfloat16, torch.device("cuda:1"), torch.strided, torch.tensor([1.5])],
    "arrays": [np.zeros((0, 3)), np.arange(6).reshape(2, 3).T, np.array(["ab"]), np.bool_(True)],
    "arrays of objects, records, times": [
        np.array([1, "a", None], object),
        np.zeros(2, [("a", "i4"), ("b", "f8")]),
        np.array(["2026-01-01"], "M8[D]"),
    ],
    **{f"numpy scalar {code}": np.ones(1, code)[0] for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"]},
}  # fmt: skip


def _alike(first: Any, second: Any) -> bool:
    if isinstance(first, np.generic):
        return first.dtype == second.dtype and first == second
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if torch.is_tensor(first):
        return torch.equal(first, second)
    if isinstance(first, (argparse.Namespace, types.SimpleNamespace)):
        return _alike(vars(first), vars(second))
    if isinstance(first, dict):
        factories = [getattr(value, "default_factory", None) for value in (first, second)]
        return (
            factories[0] is factories[1]
            and list(first) == list(second)
            and all(_alike(first[key], second[key]) for key in first)
        )
    if isinstance(first, deque) and first.maxlen != second.maxlen:
        return False
    if isinstance(first, (list, tuple, deque)):
        return len(first) == len(second) and all(map(_alike, first, second))
    return bool(first == second)


@pytest.mark.parametrize("what", VALUES)
def test_values_come_back_equal(tmp_path: Path, what: str) -> None:
    safe_save({"client_state": VALUES[what]}, tmp_path / "file", {})
    found = safe_load(tmp_path / "file")["client_state"]
    assert _alike(found, VALUES[what]), found


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


class _Own(dict[str, int]):
    pass


UNSAVEABLE: dict[str, tuple[Any, str]] = {
    "client_state['a'][0]['b']": ({"a": [{"b": lambda: 0}]}, "builtins.function"),
    "client_state['model']": ({"model": torch.nn.Linear(1, 1), "ok": 1}, "torch.nn.modules.linear.Linear"),
    "client_state['d'].default_factory": ({"d": defaultdict(lambda: 0)}, "function"),
    "a key of client_state['k']": ({"k": {torch.nn.Linear: 1}}, "type"),
    "client_state['args'].run": ({"args": argparse.Namespace(run=object())}, "object"),
    "an element of client_state['s']": ({"s": {open}}, "builtin_function_or_method"),
    "client_state['evil']": ({"evil": _Evil()}, "tests.checkpoint.test_safe._Evil"),
    "client_state['own']": ({"own": _Own(a=1)}, "tests.checkpoint.test_safe._Own"),
}


@pytest.mark.parametrize("where", UNSAVEABLE)
def test_what_cannot_be_saved_is_named_with_its_class(tmp_path: Path, where: str) -> None:
    value, kind = UNSAVEABLE[where]
    with pytest.raises(ValueError, match="cannot be saved so that loading executes no code") as caught:
        safe_save({"client_state": value, "other": 1}, tmp_path / "file", {})
    assert str(caught.value).startswith(f"{where} is of class {kind.removeprefix('builtins.')}")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    torch.save({"x": _Evil()}, tmp_path / "file")
    with pytest.raises(pickle.UnpicklingError):
        safe_load(tmp_path / "file")


def _through_a_checkpoint(folder: str) -> tuple[bool, str]:
    model = training.build_model()
    engine = xtrain.initialize(model=model, config=training.config(1))[0]
    engine.save_checkpoint(folder, client_state=VALUES)
    same = _alike(engine.load_checkpoint(folder)[1], VALUES)
    with pytest.raises(CheckpointError) as caught:
        engine.save_checkpoint(folder, client_state={"a": {"b": model}})
    return same, str(caught.value)


def test_client_state(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for same, said in ranks(2, _through_a_checkpoint, str(tmp_path)):
        assert same
        assert "client_state['a']['b'] is of class tests.toys.TwoLayers" in said
