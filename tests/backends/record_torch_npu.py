"""Records what torch_npu_names.json holds from a wheel of torch_npu, which is read and never imported.

    python -m tests.backends.record_torch_npu torch_npu-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl

The wheel: `pip download torch_npu==2.13.0 --no-deps --dest FOLDER` (never install it beside a torch that has no
NPU: it would be loaded by `import torch`).
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.backends import names

RECORD = Path(__file__).with_name("torch_npu_names.json")
ASCEND = names.ROOT / "backends" / "ascend.py"
STRINGS = {
    # What the backend relies on beyond names: text -> the file of the wheel that has to hold it.
    "ASCEND_RT_VISIBLE_DEVICES": "torch_npu/npu/__init__.py",
    'rename_privateuse1_backend("npu")': "torch_npu/_init/registry/backend.py",
    '"hccl"': "torch_npu/_init/registry/distributed.py",
    "HCCL_DETERMINISTIC": "torch_npu/lib/libtorch_npu.so",
    # Parameters keep their identity when a module moves to the device.
    "_has_compatible_shallow_copy_type": "torch_npu/lib/libtorch_npu.so",
}


class Wheel:
    """Finds definitions in the Python sources of a wheel."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.files = set(self.zip.namelist())
        self._trees: dict[str, ast.Module] = {}

    def file_of(self, module: str) -> str | None:
        base = module.replace(".", "/")
        return next((f for f in (f"{base}.py", f"{base}/__init__.py") if f in self.files), None)

    def tree(self, module: str) -> ast.Module:
        if module not in self._trees:
            file = self.file_of(module)
            assert file is not None, module
            self._trees[module] = ast.parse(self.zip.read(file))
        return self._trees[module]

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file = self.file_of(module) or ""
        package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
        package = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
        return f"{package}.{node.module}" if node.module else package

    def find(self, module: str, name: str) -> tuple[str, Any] | None:
        """(module, definition) of a name in a module; a submodule gives its name and None."""
        stars = []
        for node in ast.walk(self.tree(module)):
            if (
                isinstance(node, (ast.FunctionDef, ast.ClassDef))
                and node.name == name
                and node.col_offset == 0
            ):
                return module, node
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name and self.file_of(source):
                        return self.find(source, alias.name)
                    if alias.name == "*" and self.file_of(source):
                        stars.append(source)
            if isinstance(node, ast.Assign) and node.col_offset == 0:
                for target in node.targets:
                    if (
                        isinstance(target, ast.Name)
                        and target.id == name
                        and isinstance(node.value, ast.Call)
                    ):
                        return self._made_by(module, node.value.func)
        if self.file_of(f"{module}.{name}"):
            return f"{module}.{name}", None
        return next((found for source in stars if (found := self.find(source, name))), None)

    def _made_by(self, module: str, maker: ast.expr) -> tuple[str, Any] | None:
        """The class of `name = submodule.Class()`."""
        if isinstance(maker, ast.Attribute) and isinstance(maker.value, ast.Name):
            return self.find(f"{module}.{maker.value.id}", maker.attr)
        return self.find(module, maker.id) if isinstance(maker, ast.Name) else None

    def signature(self, dotted: str) -> str | None:
        """`(arguments)` of a function or class, "attribute" for one that can be set; None when it is not there."""
        module, *path = dotted.split(".")
        definition: Any = None
        for name in path:
            if isinstance(definition, ast.ClassDef):
                member = _member(definition, name)
                if member is None:
                    return "attribute" if _settable(definition, name) else None
                definition = member
                continue
            found = self.find(module, name)
            if found is None:
                return None
            module, definition = found
        if isinstance(definition, ast.ClassDef):
            definition = _member(definition, "__init__") or _member(definition, "__new__")
            return f"({ast.unparse(_without_first(definition.args))})" if definition else "()"
        if isinstance(definition, ast.FunctionDef):
            method = dotted.count(".") > 2 and dotted.split(".")[-2][0].isupper()
            return f"({ast.unparse(_without_first(definition.args) if method else definition.args)})"
        return None


def _member(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def _settable(node: ast.ClassDef, name: str) -> bool:
    setter = _member(node, "__setattr__")
    return setter is not None and any(
        isinstance(n, ast.Constant) and n.value == name for n in ast.walk(setter)
    )


def _without_first(arguments: ast.arguments) -> ast.arguments:
    return ast.arguments(
        **{**{f: getattr(arguments, f) for f in arguments._fields}, "args": arguments.args[1:]}
    )


def record(path: Path) -> dict[str, Any]:
    """Everything about the names that xtrain uses now.

    Raises:
        LookupError: the wheel lacks one.
    """
    wheel = Wheel(path)
    found = {}
    for use in names.of_package("torch_npu", "torch_npu.npu", ASCEND, *names.SHARED):
        signature = wheel.signature(use.name)
        if signature is None:
            raise LookupError(f"{use.where} uses {use.name}, which {path.name} does not define")
        found[use.name] = signature
    for text, file in STRINGS.items():
        if text.encode() not in wheel.zip.read(file):
            raise LookupError(f"{file} of {path.name} does not hold {text}")
    return {
        "package": "torch_npu",
        "version": path.name.split("-")[1],
        "wheel": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "recorded_by": "python -m tests.backends.record_torch_npu WHEEL (sources read, nothing imported or run)",
        "names": dict(sorted(found.items())),
        "strings": STRINGS,
    }


if __name__ == "__main__":
    RECORD.write_text(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n")
