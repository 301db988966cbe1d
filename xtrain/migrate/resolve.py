"""Whether a name of DeepSpeed's is there in xtrain: read from xtrain's own sources, which are not imported.

So the answer is never older than the installed xtrain, and costs no torch. tests/migrate compares it with what
importing the names for real gives.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from xtrain.base import stand_ins

ROOT = Path(__file__).resolve().parent.parent
_TABLES = {"_EXPORTS", "_SUBMODULES", "_GIT"}
"""Names of packages that are loaded when they are first used stand in these."""
_REFUSERS = {"refused_class", "_not_yet"}
"""Functions that make what refuses to be called."""


@dataclass
class Module:
    """What a module of xtrain binds, as far as its text says.

    Attributes:
        names: name -> the dotted path that it is imported from, or None when it is defined here.
        refused: names of classes and functions that refuse to be called, each with what the error says.
        classes: the classes that are defined here.
        others: modules whose names are this one's too: `import *`, or a `__getattr__` that asks them.
    """

    names: dict[str, str | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def file_of(module: str) -> Path | None:
    """The source of a module of xtrain, or None."""
    path = ROOT.parent.joinpath(*module.split("."))
    for candidate in (path / "__init__.py", path.with_suffix(".py")):
        if candidate.is_file():
            return candidate
    return None


def refusal(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """What a function says that does nothing but raise NotImplementedYetError; else None."""
    body = node.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]
    if len(body) != 1 or not isinstance(body[0], ast.Raise) or not isinstance(body[0].exc, ast.Call):
        return None
    call = body[0].exc
    if not (isinstance(call.func, ast.Name) and call.func.id == "NotImplementedYetError"):
        return None
    return ": ".join(str(ast.literal_eval(part)) for part in call.args if isinstance(part, ast.Constant))


class _Reader(ast.NodeVisitor):
    """Collects what a module binds; goes into `if`, `try` and `with`, not into functions and classes."""

    def __init__(self) -> None:
        self.found = Module()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.found.names[node.name] = None
        said = refusal(node)
        if said is not None:
            self.found.refused[node.name] = said
        if node.name == "__getattr__":
            self._asked(node)

    def _asked(self, node: ast.FunctionDef) -> None:
        """Modules that a `__getattr__` hands names on to, and those names that it compares with."""
        for inner in ast.walk(node):
            if (
                isinstance(inner, ast.Call)
                and isinstance(inner.func, ast.Name)
                and inner.func.id == "getattr"
            ):
                target = inner.args[0]
                where = self.found.names.get(target.id) if isinstance(target, ast.Name) else None
                if where is not None:
                    self.found.others.append(where)
            elif isinstance(inner, ast.Compare) and isinstance(inner.ops[0], ast.Eq | ast.NotEq):
                for side in inner.comparators:
                    if isinstance(side, ast.Constant) and isinstance(side.value, str):
                        self.found.names.setdefault(side.value, None)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.found.names[node.name] = None
        self.found.classes[node.name] = node

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            name = alias.asname or alias.name.partition(".")[0]
            self.found.names[name] = alias.name if alias.asname else name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                self.found.others.append(node.module or "")
            else:
                self.found.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            for inner in ast.walk(target):
                if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    self._bind(inner.id, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._bind(node.target.id, node.value)

    def _bind(self, name: str, value: ast.expr | None) -> None:
        if name in _TABLES:
            listed = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [])
            for key in listed:
                if isinstance(key, ast.Constant):
                    self.found.names.setdefault(str(key.value), None)
        source = self.found.names.get(value.id) if isinstance(value, ast.Name) else None
        self.found.names[name] = source
        said = _refusing_call(value)
        if said is not None:
            self.found.refused[name] = said
        if isinstance(value, ast.Name) and value.id in self.found.refused:
            self.found.refused[name] = self.found.refused[value.id]


@cache
def read(module: str) -> Module | None:
    """What a module of xtrain binds; None when there is no such module."""
    path = file_of(module)
    if path is None:
        return None
    reader = _Reader()
    reader.visit(ast.parse(path.read_text(encoding="utf-8")))
    return reader.found


@dataclass(frozen=True)
class Place:
    """Where a dotted path leads.

    Attributes:
        there: whether it leads anywhere.
        refused: for a class or function that only refuses, what it says (perhaps nothing).
    """

    there: bool
    refused: str | None = None


@cache
def find(path: str) -> Place:
    """Follow a dotted path, `xtrain.ops.adam.FusedAdam`, through modules and imports."""
    return _find(path, frozenset())


def _find(path: str, seen: frozenset[str]) -> Place:
    if path in seen:
        return Place(False)
    if not path.startswith("xtrain"):
        return Place(True)  # imported from elsewhere: torch and the like
    if read(path) is not None or file_of(path) is not None:
        return Place(True)
    stands_in = stand_ins.kind(path.removeprefix("xtrain."))
    if stands_in is not None or stand_ins.is_module(path.removeprefix("xtrain.")):
        return Place(True, None if stands_in in (None, "constant") else "")
    module, _, name = path.rpartition(".")
    if not module:
        return Place(False)
    holder = read(module)
    if holder is None and stand_ins.is_module(module.removeprefix("xtrain.")):
        return Place(False)
    if holder is None:  # an attribute of something that is no module
        above = _find(module, seen | {path})
        return _attribute(module, name, above, seen | {path})
    if name in holder.refused:
        return Place(True, holder.refused[name])
    if name in holder.names:
        source = holder.names[name]
        return Place(True) if source is None else _find(source, seen | {path})
    return next(
        (found for other in holder.others if (found := _find(f"{other}.{name}", seen | {path})).there),
        Place(False),
    )


def _attribute(path: str, name: str, above: Place, seen: frozenset[str]) -> Place:
    """An attribute of a class or object. What the text of a class does not say is taken to be there."""
    module, _, inner = path.rpartition(".")
    source = None
    holder = read(module) if module else None
    if holder is not None:
        source = holder.names.get(inner)
        if source is None and inner not in holder.names:
            source = next(
                (f"{other}.{inner}" for other in holder.others if _find(f"{other}.{inner}", seen).there), None
            )
    if above.there and above.refused is None and source is not None and file_of(source) is not None:
        return _find(f"{source}.{name}", seen)  # a module under another name
    return above


def members(path: str) -> dict[str, str | None]:
    """The attributes of a class of xtrain, with those of its bases: name -> what it says if it only refuses."""
    module, _, name = path.rpartition(".")
    holder = read(module)
    if holder is None:
        return {}
    if name not in holder.classes:
        source = holder.names.get(name)
        if source is None or not source.startswith("xtrain"):
            return {}
        return members(source)
    node = holder.classes[name]
    found: dict[str, str | None] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            found |= members(f"{module}.{base.id}")
    return found | _own_members(node)


def _own_members(node: ast.ClassDef) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            found.setdefault(statement.name, refusal(statement))  # a property's setter is not what is read
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in (inner for outer in targets for inner in ast.walk(outer)):
                if isinstance(target, ast.Name):
                    found[target.id] = _refusing_call(statement.value)
    for inner in ast.walk(node):
        if (
            isinstance(inner, ast.Attribute)
            and isinstance(inner.ctx, ast.Store)
            and isinstance(inner.value, ast.Name)
            and inner.value.id == "self"
        ):
            found.setdefault(inner.attr, None)
    return found


def _refusing_call(value: ast.expr | None) -> str | None:
    """What a name says that is bound to `refused_class(...)` or `_not_yet(...)`: their last text; else None."""
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Name | ast.Attribute):
        return None
    called = value.func.id if isinstance(value.func, ast.Name) else value.func.attr
    if called not in _REFUSERS:
        return None
    texts = [
        part.value for part in value.args if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    return texts[-1] if called == "_not_yet" and texts else ""
