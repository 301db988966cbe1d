"""Errors travel between processes: a pool's parent unpickles what its worker raised, or waits for ever."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import inspect
import pickle
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _classes() -> list[type[BaseException]]:
    """Every exception class that a file of the project defines, whatever it derives from.

    The files are read, not imported: some of them are programs, or change what `import deepspeed` means.
    """
    bases: dict[str, tuple[str, set[str]]] = {}
    folders = [ROOT / "xtrain", *(ROOT / "xtrain" / name for name in ("backends", "comm", "launch"))]
    for path in (path for folder in folders for path in folder.glob("**/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names = {getattr(base, "attr", getattr(base, "id", "")) for base in node.bases}
                bases[node.name] = (module, names)
    raised = {name for name, value in vars(builtins).items() if _is_error(value)}
    while new := {name for name, (_, names) in bases.items() if names & raised} - raised:
        raised |= new
    found = [getattr(importlib.import_module(bases[name][0]), name) for name in sorted(raised & bases.keys())]
    assert all(map(_is_error, found))
    return found


def _is_error(value: object) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def _made(kind: type[BaseException]) -> BaseException:
    """An instance with a string for every argument without a default."""
    if not inspect.isfunction(kind.__init__):
        return kind("what was wrong")
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    needed = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return kind(*[f"the {p.name}" for p in needed])


CLASSES = _classes()


def test_the_classes_are_found() -> None:
    names = {kind.__name__ for kind in CLASSES}
    assert {"ConfigError", "NotImplementedYetError", "MissingNameError", "MissingModuleError"} <= names
    assert {"CheckpointError", "RunInterrupted", "Wrong", "DeprecatedException"} <= names


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_pickled_and_copied(kind: type[BaseException]) -> None:
    error = _made(kind)
    error.add_note("seen on rank 1")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert again.args == error.args
        assert vars(again) == vars(error)
