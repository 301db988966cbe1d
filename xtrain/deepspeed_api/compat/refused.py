"""Classes of features that are not there, for scripts that import, subclass or test for them without using them.

Whole modules of such a feature stay missing (missing.py); a class stands in where scripts import it at their top.
"""

from __future__ import annotations

from typing import Any

from xtrain.base import missing
from xtrain.base.errors import NotImplementedYetError


def refused_class(path: str, base: type = object) -> Any:
    """A class whose constructor explains that it is not there.

    Args:
        path: its dotted path below `deepspeed`, which the table in missing.py must cover.
        base: what DeepSpeed's class derives from.
    """
    entry = missing.find(path)
    assert entry is not None, path

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedYetError(f"{path} ({entry.feature})", entry.instead)

    name = path.rpartition(".")[2]
    module = f"xtrain.{path.rpartition('.')[0]}"
    return type(
        name,
        (base,),
        {"__init__": __init__, "__module__": module, "__doc__": f"Not there yet: {entry.instead}."},
    )
