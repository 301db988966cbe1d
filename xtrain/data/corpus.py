"""Finding text: files, folders and globs, or Python's own standard library when nothing is named.

Imports no torch: the launcher checks the paths before it starts any rank.
"""

from __future__ import annotations

import glob
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from xtrain.base.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".py")
_SKIP = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__", "turtledemo"}


def standard_library_files() -> list[Path]:
    """The Python standard library's modules, without its tests: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if not _SKIP & set(path.relative_to(root).parts[:-1]))


def find_files(paths: list[str] | None) -> list[Path]:
    """The files that `paths` (files, folders, globs) name, sorted; the standard library for None.

    Raises:
        DataError: a path or pattern names nothing that can be read.
    """
    if not paths:
        return standard_library_files()
    found: set[Path] = set()
    for pattern in paths:
        matches = [Path(match) for match in glob.glob(str(Path(pattern).expanduser()), recursive=True)]
        files = [path for path in matches if path.is_file()]
        for folder in (path for path in matches if path.is_dir()):
            files += [path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file()]
        if not files:
            what = "does not exist" if not matches else f"holds no {', '.join(SUFFIXES)} file"
            raise DataError(f"data path {pattern!r} {what}")
        found.update(files)
    return sorted(found)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"data file {path} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error}") from None


def _documents_of_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"data file {path}, line {number}: not a JSON object with a key 'text'") from None
        if not isinstance(text, str):
            raise DataError(f"data file {path}, line {number}: 'text' is not a string")
        yield text


def documents(files: list[Path]) -> Iterator[str]:
    """The non-empty documents of the files: one a line in .jsonl, one a file otherwise."""
    for path in files:
        texts = _documents_of_jsonl(path) if path.suffix == ".jsonl" else iter([_read(path)])
        yield from (text for text in texts if text.strip())
