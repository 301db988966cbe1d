"""Core groups, memory and the hook for kernels, on a Linux host."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from xtrain.backends import detect, get, sunway
from xtrain.base.errors import BackendError


@pytest.fixture(autouse=True)
def _whole_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    cores = os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: len(cores))
    yield
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)


def test_detection_takes_it_on_a_sunway_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect().name == "cpu"
    monkeypatch.setattr(sunway.platform, "machine", lambda: "sw_64")
    assert detect().name == "sunway"
    assert get("sunway").runtime.device_count() == 6
    with pytest.raises(BackendError, match="local rank 6 has no core group of its own: this node has 6"):
        get("sunway").runtime.device(6)


@pytest.mark.parametrize(
    ("groups", "cores", "expected"),
    [
        (2, [0, 1, 2, 3], [[0, 1], [2, 3]]),
        (3, [4, 5, 6, 7], [[4], [5], [6, 7]]),
        (4, [8, 9], [[8], [9], [8], [9]]),
        (6, list(range(390)), [list(range(65 * g, 65 * g + 65)) for g in range(6)]),
    ],
)
def test_groups_share_the_cores(groups: int, cores: list[int], expected: list[list[int]]) -> None:
    assert [sunway.cores_of(group, groups, cores) for group in range(groups)] == expected


def test_a_rank_is_bound_unless_the_launcher_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert sunway.bind_cores(0) == cores  # nobody says how many ranks there are
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(len(cores)))
    monkeypatch.setenv("XTRAIN_CORE_BINDING", "none")
    assert sunway.bind_cores(0) == cores
    monkeypatch.delenv("XTRAIN_CORE_BINDING")
    last = len(cores) - 1
    sunway.SunwayRuntime().set_device(last)
    assert os.sched_getaffinity(0) == {cores[last]}
    if last:
        assert sunway.bind_cores(0) == [cores[last]]  # bound already
    monkeypatch.setenv("XTRAIN_CORE_BINDING", "tight")
    with pytest.raises(BackendError, match="XTRAIN_CORE_BINDING is 'tight': choose auto or none"):
        sunway.bind_cores(0)
    monkeypatch.setenv("XTRAIN_CORE_GROUPS", "many")
    with pytest.raises(BackendError, match="XTRAIN_CORE_GROUPS is 'many': it must be a positive number"):
        sunway.core_groups()


def _strict() -> tuple[str, str]:
    """(refusal, memory policies of the process)."""
    os.environ["XTRAIN_MEMORY_BINDING"] = "strict"
    try:
        sunway.bind_memory(sorted(os.sched_getaffinity(0)))
    except BackendError as error:
        return str(error), ""
    finally:
        del os.environ["XTRAIN_MEMORY_BINDING"]
    policies = Path("/proc/self/numa_maps").read_text()
    ctypes.CDLL("libnuma.so.1").numa_set_localalloc()  # the worker has other tests to run
    return "", policies


def test_memory_can_be_bound_strictly_or_says_why_not(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, policies = ranks(1, _strict)[0]
    assert ("XTRAIN_MEMORY_BINDING=strict needs" in refused) if refused else ("bind:" in policies)
    monkeypatch.setenv("XTRAIN_MEMORY_BINDING", "strict")
    monkeypatch.setattr(sunway, "_NODES", Path("/no/such/folder"))
    with pytest.raises(BackendError, match="XTRAIN_MEMORY_BINDING=strict needs"):
        sunway.bind_memory([0])


def test_cores_belong_to_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for core in ("node0/cpu0", "node0/cpu1", "node1/cpu2"):
        (tmp_path / core).mkdir(parents=True)
    monkeypatch.setattr(sunway, "_NODES", tmp_path)
    assert sunway.memory_nodes([0, 1]) == [0]
    assert sunway.memory_nodes([1, 2]) == [0, 1]


def test_a_library_of_kernels_plugs_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fake_sw_math.py").write_text(
        "calls = []\ndef install(core_group, cores):\n    calls.append((core_group, cores))\n    return 'fake 1.0'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XTRAIN_SUNWAY_MATH", "fake_sw_math:install")
    runtime = sunway.SunwayRuntime()
    runtime.set_device(0)
    runtime.set_device(0)
    import fake_sw_math  # type: ignore[import-not-found]

    assert fake_sw_math.calls == [(0, sorted(os.sched_getaffinity(0)))]  # once
    for wrong in ("fake_sw_math:no_such", "no_such_module:install", "nonsense"):
        monkeypatch.setenv("XTRAIN_SUNWAY_MATH", wrong)
        with pytest.raises(BackendError, match=r"XTRAIN_SUNWAY_MATH is .* must be module:function"):
            sunway.install_math(0, [0])
