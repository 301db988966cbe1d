"""Which folder of xtrain imports which: `python -m tests.architecture` prints it, tests/test_architecture.py holds it.

Every import counts, those for types and inside functions too. A link (xtrain/runtime, xtrain/comm) stands for the
folder that it leads to.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "xtrain"

FOLDERS = (
    "base",
    "backends",
    "shims",
    "config",
    "models",
    "data",
    "comm",
    "parallel",
    "precision",
    "optim",
    "zero",
    "activation_checkpointing",
    "reproducible",
    "checkpoint",
    "engine",
    "metrics",
    "integrity",
    "launch",
    "align",
    "doctor",
    "deepspeed_engine",
    "deepspeed_api",
    "migrate",
    "doors",
)
"""From the lowest to the highest: a folder imports from those before it only. "doors": the files loose in xtrain/."""

Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Every module of the package by the name that it is imported by."""
    found: dict[str, Path] = {}
    links = [path for path in ROOT.iterdir() if path.is_symlink()]
    behind = {link.resolve() for link in links}
    inside = [path for link in links if link.is_dir() for path in sorted(link.rglob("*.py"))]
    for path in [*sorted(ROOT.rglob("*.py")), *inside]:
        if path.is_relative_to(ROOT / "deepspeed_api") and behind.intersection((path, *path.parents)):
            continue  # it is there under the link's name
        found[".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def folder_of(name: str, path: Path) -> str:
    """The folder that a module is in."""
    real = path.resolve()
    if real.is_relative_to(ROOT):
        parts = real.relative_to(ROOT).parts
        if len(parts) > 1:
            return parts[0]
        return "base" if name == "xtrain.version" else "doors"
    return real.relative_to(ROOT.parent).parts[0]


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of xtrain that a file imports."""
    result = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            targets = [
                inner if (inner := f"{node.module}.{alias.name}") in known else node.module
                for alias in node.names
            ]
        else:
            continue
        result |= {target for target in targets if target == "xtrain" or target.startswith("xtrain.")}
    return result - {name}


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach one another (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


class Architecture:
    """The imports of the checkout.

    Attributes:
        known: module -> its file.
        folders: module -> its folder.
        files: file -> files that it imports.
        arrows: (folder, folder) -> the imports between them, as "module -> module".
        unknown: imports of modules that are not there.
    """

    def __init__(self) -> None:
        known = self.known = modules()
        folder = {name: folder_of(name, path) for name, path in known.items()}
        self.folders = folder
        self.files: Graph = {}
        self.arrows: dict[tuple[str, str], list[str]] = defaultdict(list)
        self.unknown: list[str] = []
        for name, path in known.items():
            self.files[name] = imports(name, path, known)
            for target in sorted(self.files[name]):
                if target not in known:
                    self.unknown.append(f"{name} -> {target}")
                elif folder[name] != folder[target]:
                    self.arrows[folder[name], folder[target]].append(f"{name} -> {target}")

    def upward(self) -> list[str]:
        """Imports that point up."""
        height = {folder: number for number, folder in enumerate(FOLDERS)}
        return [
            line
            for (source, target), lines in sorted(self.arrows.items())
            if height[source] < height[target]
            for line in lines
        ]

    def circles(self) -> list[list[str]]:
        """Circles of files. A package's `__init__` counts like any file."""
        return circles(self.files)

    def loose(self) -> list[str]:
        """Files that lie loose in xtrain/; links are not files."""
        return sorted(path.name for path in ROOT.iterdir() if path.is_file() and not path.is_symlink())


def main() -> int:
    """Print folders, arrows and what breaks the rules; the exit status says whether anything does."""
    found = Architecture()
    for folder in reversed(FOLDERS):
        targets = [
            f"{target} {len(lines)}" for (source, target), lines in found.arrows.items() if source == folder
        ]
        files = sum(1 for other in found.folders.values() if other == folder)
        print(f"{folder} ({files} files) -> {', '.join(sorted(targets)) or 'nothing'}")
    upward, rings = found.upward(), found.circles()
    print(f"\nloose in xtrain/: {len(found.loose())}: {', '.join(found.loose())}")
    print(f"imports of what is not there: {len(found.unknown)}", *found.unknown, sep="\n  ")
    print(f"upward arrows: {len(upward)}", *upward, sep="\n  ")
    print(f"circles of files: {len(rings)}", *(" <-> ".join(ring) for ring in rings), sep="\n  ")
    return bool(upward or rings or found.unknown)


if __name__ == "__main__":
    sys.exit(main())
