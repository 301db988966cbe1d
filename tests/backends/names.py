"""Which names of a vendor's package xtrain takes, with how many arguments: read from our sources, nothing imported.

`self.chip` (in backends/) and `self._module` (in xtrain/accelerator/) are torch's module of the device type.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DEVICE_MODULE = "<device module>"
_ALIASES = {"self.chip": DEVICE_MODULE, "self._module": DEVICE_MODULE}
PROMISED = [
    f"{DEVICE_MODULE}.{name}"
    for name in ("Stream.wait_stream", "Event.record", "Event.wait", "Event.synchronize")
]
"""Of the objects that a device module's Stream and Event make."""
SHARED = [
    ROOT / "backends" / "backend.py",
    ROOT / "backends" / "device.py",
    ROOT / "xtrain" / "deepspeed_engine" / "facade.py",
    ROOT / "xtrain" / "deepspeed_engine" / "facade_memory.py",
]
"""Sources that speak to any device module."""


class Use(NamedTuple):
    """A dotted name at a line; how it is called: (positional arguments, keywords), or None."""

    name: str
    where: str
    call: tuple[int, tuple[str, ...]] | None


def _chain(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := _chain(node.value)) is not None:
        full = f"{base}.{node.attr}"
        return _ALIASES.get(full, full)
    return None


class _Collect(ast.NodeVisitor):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.uses: list[Use] = []

    def _add(self, node: ast.Attribute, call: tuple[int, tuple[str, ...]] | None) -> None:
        name = _chain(node)
        if name is None:
            self.visit(node.value)
        elif name not in _ALIASES.values():
            self.uses.append(Use(name, f"{self.path.name}:{node.lineno}", call))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._add(node, None)

    def visit_Call(self, node: ast.Call) -> None:
        starred = any(isinstance(a, ast.Starred) for a in node.args) or any(
            k.arg is None for k in node.keywords
        )
        call = None if starred else (len(node.args), tuple(k.arg for k in node.keywords if k.arg))
        if isinstance(node.func, ast.Attribute):
            self._add(node.func, call)
        elif isinstance(node.func, ast.Name) and node.func.id == "_asks":
            # A method that asks the module for a device, by name.
            name = ast.literal_eval(node.args[0])
            self.uses.append(Use(f"{DEVICE_MODULE}.{name}", f"{self.path.name}:{node.lineno}", (1, ())))
        else:
            self.visit(node.func)
        for part in (*node.args, *node.keywords):
            self.visit(part)


def uses(*paths: Path) -> list[Use]:
    """Every dotted name in the sources, longest form only."""
    found = []
    for path in paths:
        collector = _Collect(path)
        collector.visit(ast.parse(path.read_text()))
        found += collector.uses
    return found


def of_package(package: str, device_module: str, *paths: Path) -> list[Use]:
    """Uses of `package`; the device module is called `device_module` there (`torch_npu.npu`)."""
    kept = []
    for use in [*uses(*paths), *(Use(name, "promised", None) for name in PROMISED)]:
        name = use.name.replace(DEVICE_MODULE, device_module)
        name = name.replace("torch.npu.", "torch_npu.npu.") if package == "torch_npu" else name
        if name.startswith(f"{package}."):
            kept.append(use._replace(name=name))
    return kept
