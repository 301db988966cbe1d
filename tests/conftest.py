"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest

os.environ["OMP_NUM_THREADS"] = "1"
for _variable in ("XTRAIN_BACKEND", "DS_ACCELERATOR", "XTRAIN_RUN_DIR", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(_variable, None)

# Times are measured in benchmarks/, not here: machines are shared.
hypothesis.settings.register_profile("xtrain", deadline=None)
hypothesis.settings.load_profile("xtrain")

from tests import pool  # noqa: E402 - workers inherit the environment set above


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -n`: the tests of a file share a process, and its ranks; all that start Slurm or hosts share one, too."""
    for item in items:
        group = "services" if item.get_closest_marker("services") else item.path.as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests never touch the user's cache. Set before any worker starts, which inherits it."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XTRAIN_CACHE"] = str(folder)
    yield folder
    pool.close_all()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test sets, or has set by starting ranks of its own, is not handed to the processes of the next."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def ranks() -> Callable[..., list[Any]]:
    """`ranks(n, function, *args)`: run a module-level function on n ranks; results by rank."""

    def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        return pool.pool(world_size).run(function, *args)

    return run
