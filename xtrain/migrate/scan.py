"""Lists what a repository uses of DeepSpeed, CUDA and apex. Syntax trees and text only: nothing of it is executed.

for use in scan(Path("repository")):
    print(use.file, use.line, use.kind, use.name)
"""

from __future__ import annotations

import ast
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.migrate.configs import read_config
from xtrain.migrate.shell import SHELL_SUFFIXES, VARIABLES, commands
from xtrain.migrate.syntax import uses_of_tree
from xtrain.migrate.use import CUDA_LIBRARIES, WORDS, Use

CUDA_SOURCES = (".cu", ".cuh")
CONFIG_SUFFIXES = (".json", ".yaml", ".yml")
READABLE = (".py", ".ipynb", *CUDA_SOURCES, *CONFIG_SUFFIXES, *SHELL_SUFFIXES)
_SKIPPED = {".git", ".hg", ".svn", "__pycache__", "node_modules", ".venv", "venv", ".tox", ".mypy_cache"}
_WORTH_IT = re.compile(
    "|".join((*WORDS, *CUDA_LIBRARIES, *VARIABLES, "zero_", "train_batch_size", "train_micro_batch")).encode()
)
_MAGIC = re.compile(r"^(\s*)([!%?].*|.*\?\s*)$")


def files_of(path: Path) -> Iterator[Path]:
    """The files below a path that may hold something, sorted; a file is itself.

    Raises:
        ConfigError: the path is not there.
    """
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if path.is_file():
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        for name in sorted(names):
            file = Path(folder, name)
            if file.suffix in READABLE and file.is_file():  # a link to nowhere is no file
                yield file


def scan(path: str | Path) -> list[Use]:
    """Every use in a file or in all files of a folder, by file and line.

    Raises:
        ConfigError: the path is not there.
    """
    root = Path(path)
    found: list[Use] = []
    for file in files_of(root):
        shown = file.name if root.is_file() else file.relative_to(root).as_posix()
        uses = sorted(scan_file(file, shown), key=lambda use: (use.cell or 0, use.line))
        found += [use for use in uses if not _is_local(use, file.parent, root)]
    return found


def _is_local(use: Use, *folders: Path) -> bool:
    """Whether a library's name is that of a module beside the file, or at the top of the repository."""
    if use.kind not in ("library", "apex"):
        return False
    name = use.name.partition(".")[0]
    return any(
        (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file() for folder in folders
    )


def scan_file(file: Path, shown: str) -> list[Use]:
    """Every use in one file, which is called `shown` in them."""
    if file.suffix in CUDA_SOURCES:
        return [Use(shown, 1, "extension", "CUDA source")]
    try:
        data = file.read_bytes()
    except OSError as error:
        return [Use(shown, 1, "unreadable", str(error))]
    if file.suffix == ".ipynb":
        return _notebook(data, shown)
    if file.suffix in CONFIG_SUFFIXES:
        return read_config(data, file.suffix, shown)
    if file.suffix in SHELL_SUFFIXES:
        return commands(data.decode("utf-8", "replace"), shown)
    return _python(data, shown)


def _parse(source: str | bytes) -> ast.Module | str:
    """The tree, or what is wrong: "line 3: ..."."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        try:
            return ast.parse(source)
        except SyntaxError as error:
            return f"line {error.lineno or 1}: {error.msg}"
        except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nested too deep
            return f"line 1: {type(error).__name__}: {error}"


def _unreadable(shown: str, wrong: str, cell: int | None = None) -> Use:
    line, _, message = wrong.removeprefix("line ").partition(": ")
    if "print" in message and "parentheses" in message:
        message = f"Python 2: {message}"
    return Use(shown, int(line), "unreadable", message, cell=cell)


def _python(data: bytes, shown: str) -> list[Use]:
    tree = _parse(data)
    if isinstance(tree, str):
        return [_unreadable(shown, tree)]
    return uses_of_tree(tree, shown) if _WORTH_IT.search(data) else []


def _without_magics(lines: list[str]) -> list[str]:
    """A cell's lines with IPython's own syntax taken out, as many as before."""
    result = []
    for line in lines:
        magic = _MAGIC.match(line)
        result.append(f"{magic.group(1)}pass" if magic else line)
    return result


def _notebook(data: bytes, shown: str) -> list[Use]:
    """A notebook's code cells as one module: names that one cell imports are known in those after it."""
    try:
        cells: list[Any] = json.loads(data)["cells"]
        sources = [
            (number, "".join(cell["source"]))
            for number, cell in enumerate(cells, 1)
            if cell["cell_type"] == "code"
        ]
    except (ValueError, KeyError, TypeError) as error:
        return [
            Use(
                shown, 1, "unreadable", f"not a notebook of format 4 or later: {type(error).__name__} {error}"
            )
        ]
    found: list[Use] = []
    joined: list[str] = []
    places: list[tuple[int, int]] = []
    for number, source in sources:
        lines = source.splitlines()
        shell = [line.strip().removeprefix("!") if line.strip().startswith("!") else "" for line in lines]
        if source.startswith(("%%bash", "%%sh")):
            shell, lines = ["", *lines[1:]], []
        elif source.startswith("%%"):
            lines = []  # another language, or written to a file
        found += commands("\n".join(shell), shown, number)
        lines = _without_magics(lines)
        wrong = _parse("\n".join(lines))
        if isinstance(wrong, str):
            found.append(_unreadable(shown, wrong, number))
            found += commands("\n".join(lines), shown, number)  # it may be shell
            continue
        joined += lines
        places += [(number, line) for line in range(1, len(lines) + 1)]
    tree = _parse("\n".join(joined))
    if isinstance(tree, str):
        return [*found, _unreadable(shown, tree)]
    for use in uses_of_tree(tree, shown):
        cell, line = places[use.line - 1]
        found.append(Use(shown, line, use.kind, use.name, use.optional, cell, use.value))
    return found
