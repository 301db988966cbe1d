"""A script that uses xtrain and the installed deepspeed at once, which have an engine each."""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.shims import alias


def import_line() -> str:
    """`file:line` of the script's first import of deepspeed; the script's name, or "a library", where it has none."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None or not Path(script).is_file():
        return "a library"
    try:
        tree = ast.parse(Path(script).read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # it runs nevertheless: not Python source
        return str(script)
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.partition(".")[0] == "deepspeed" for name in names):
            return f"{script}:{getattr(node, 'lineno', 0)}"
    return f"a library that {script} imports"


def _is_theirs(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "deepspeed"


def check(given: dict[str, Any], parameters: Iterable[Any]) -> None:
    """Refuse objects of the installed deepspeed, and warn where it is imported at all.

    Args:
        given: the arguments of initialize(), by name.
        parameters: the model's.

    Raises:
        ConfigError: naming the object, and the line that imports deepspeed.
    """
    theirs = sys.modules.get("deepspeed")
    if theirs is None or alias.is_ours(theirs):
        return
    for name, thing in given.items():
        if _is_theirs(thing):
            raise ConfigError(
                f"{name} is a {type(thing).__name__} of the installed deepspeed, which {import_line()} imports: "
                "take it from xtrain, or start the script by `xtrain run`"
            )
    if any(_is_theirs(getattr(parameter, "ds_status", None)) for parameter in parameters):
        raise ConfigError(
            "the model was built under zero.Init of the installed deepspeed, which "
            f"{import_line()} imports: take it from xtrain, or start the script by `xtrain run`"
        )
    _warn_once()


@cache
def _warn_once() -> None:
    log_dist(
        f"{import_line()} imports the installed deepspeed, and xtrain's engine trains: what is taken from deepspeed "
        "does not know of it; `xtrain run` makes both names mean xtrain",
        ranks=[0],
        level=logging.WARNING,
    )
