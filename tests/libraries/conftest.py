"""`ranks` of these tests: forked from a process in which `import deepspeed` is xtrain and the libraries are loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import pool

LIBRARIES = ("transformers", "accelerate", "trl", "peft", "lightning", "datasets")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this folder is the stage `make test-libraries`, and needs the extra."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.libraries)
            item.add_marker(pytest.mark.slow)
            if MISSING:
                item.add_marker(pytest.mark.skip(f"needs the extra libraries: no {', '.join(MISSING)}"))


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """`ranks(n, function, *args)`: run a module-level function on n ranks; results by rank."""

    def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        pool.PRELOAD.append("tests.libraries.loaded")
        return pool.pool(world_size).run(function, *args)

    return run
