"""Cores for ranks, on machines that are described here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xtrain.base.errors import ConfigError
from xtrain.launch.deepspeed import binding

FOUR = {0: [0, 1, 4, 5], 1: [2, 3, 6, 7]}
"""Four cores of two threads each, in two NUMA nodes."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Processors 0 to 7, of which N and N + 4 are one core; and numactl."""
    for number in range(8):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    monkeypatch.setattr(binding, "_CPUS", tmp_path)
    monkeypatch.setattr(binding, "numa_nodes", lambda: FOUR)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(binding.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.delenv("KMP_AFFINITY", raising=False)
    return monkeypatch


def test_physical_cores_are_divided_in_order(machine: pytest.MonkeyPatch) -> None:
    assert binding.physical_cores() == [0, 1, 2, 3]
    assert binding.binding(None, 2, 1) == binding.Binding([2, 3], ["numactl", "-m", "1", "-C", "2-3"])
    assert binding.binding(None, 1, 0).prefix == ["numactl", "-C", "0-3"]  # memory of both nodes
    assert binding.binding("1,3-5,7", 2, 1) == binding.Binding([4, 5], ["numactl", "-m", "0", "-C", "4-5"])
    machine.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert binding.physical_cores() == [1, 6]


def test_without_numactl_there_is_no_prefix(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(binding.shutil, "which", lambda name: None)
    assert binding.binding("0-7", 2, 0) == binding.Binding([0, 1, 2, 3], [])


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        ({0: [0, 1], 1: [2, 3], 2: [], 3: []}, ["-p", "3"]),  # fast memory as nodes of its own
        ({0: [0, 1], 1: [0, 1], 2: [2, 3], 3: [2, 3]}, ["-m", "2,3"]),  # nodes that were divided
        ({0: [0, 1], 1: [2, 3], 2: []}, ["-m", "1"]),
        ({}, []),
    ],
)
def test_memory(nodes: dict[int, list[int]], options: list[str]) -> None:
    assert binding._memory([2, 3], nodes) == options


@pytest.mark.parametrize("text", ["0,2-6,5-9", "8,2-6", "1,6-2", "1-", "a", "", "1-2-3", "1,,2", "-1"])
def test_lists_that_are_wrong(text: str) -> None:
    with pytest.raises(ConfigError, match="the core list"):
        binding.parse_range_list(text)


def test_lists_are_written_as_they_are_read() -> None:
    assert binding.parse_range_list("0,2-4,6,8-9") == [0, 2, 3, 4, 6, 8, 9]
    assert binding._ranges([0, 2, 3, 4, 6, 8, 9]) == "0,2-4,6,8-9"


def test_what_cannot_be_bound(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="4 cores cannot be divided over 5 ranks"):
        binding.binding(None, 5, 0)
    with pytest.raises(ConfigError, match="may not use: 8-9"):
        binding.binding("6-9", 1, 0)
    machine.setenv("KMP_AFFINITY", "compact")
    with pytest.raises(ConfigError, match="unset it"):
        binding.binding(None, 1, 0)


def test_the_system_lists_its_nodes() -> None:
    allowed = os.sched_getaffinity(0)
    assert all(core in allowed for core in binding.physical_cores())
    nodes = binding.numa_nodes()
    assert not nodes or allowed & {core for cores in nodes.values() for core in cores}
