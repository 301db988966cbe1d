"""Which of the launcher's arguments a script takes, as its source says. Nothing is executed."""

from __future__ import annotations

import ast
from pathlib import Path

PASS_LOCAL_RANK = "--pass-local-rank"
"""Before the script, for `xtrain.launch.rank`: the script gets --local_rank=N as its first argument."""
OPTIONS = ("--deepspeed", "--deepspeed_config")
"""By which DeepSpeed's scripts are given a config."""


def config_options(script: Path) -> list[str]:
    """Those of --deepspeed and --deepspeed_config that the script, or a module of its own that it imports, knows.

    A module counts when its file is below the script's folder: that is where `python script.py` finds it first.
    """
    found = _known(script, script.parent, set())
    # `--deepspeed FILE` is another option, Transformers' own.
    return [option for option in OPTIONS if option in found] if "--deepspeed_config" in found else []


def _known(file: Path, folder: Path, seen: set[Path]) -> set[str]:
    if file in seen or not file.is_file():
        return set()
    seen.add(file)
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # the rank that runs it says so
        return set()
    found = {option for node in ast.walk(tree) for option in _named(node)}
    return found.union(
        *(_known(other, folder, seen) for name in _imported(tree) for other in _files(name, folder))
    )


def _named(node: ast.AST) -> tuple[str, ...]:
    """Options of this name, and what `add_config_arguments(parser)` adds."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
    if name == "add_config_arguments":
        return OPTIONS
    text = (
        node.value.replace("-", "_") if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
    )
    return tuple(option for option in OPTIONS if text == option.replace("-", "_"))


def _imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _files(module: str, folder: Path) -> list[Path]:
    path = folder.joinpath(*module.split("."))
    return [path.with_suffix(".py"), path / "__init__.py"]
