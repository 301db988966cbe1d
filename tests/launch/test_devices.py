"""Counting devices without torch: drivers' files and tools are played by stand-ins."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

from xtrain.base.errors import BackendError
from xtrain.launch import devices
from xtrain.launch.deepspeed import binding
from xtrain.launch.devices import Devices


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without devices or plug-ins, whose torch is for CUDA."""
    for chip in devices._CHIPS:
        _has(monkeypatch, chip, 0)
    monkeypatch.setattr(devices, "_torch_build", lambda: "cu126")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    return monkeypatch


def _has(patch: pytest.MonkeyPatch, name: str, count: int) -> None:
    chip = devices._CHIPS[name]
    patch.setitem(devices._CHIPS, name, devices._Chip(chip.variable, lambda: count, chip.fits))


def test_a_chip_counts_when_torch_is_built_for_it(machine: pytest.MonkeyPatch) -> None:
    assert devices.find({}) == Devices("cpu", None)
    _has(machine, "cuda", 8)
    assert devices.find({}) == Devices("cuda", 8, ("CUDA_VISIBLE_DEVICES",))
    machine.setattr(devices, "_torch_build", lambda: "cpu")
    assert devices.find({}) == Devices("cpu", None)
    _has(machine, "dcu", 4)
    machine.setattr(devices, "_torch_build", lambda: "das.opt1.dtk24043")
    assert devices.find({}) == Devices("dcu", 4, ("HIP_VISIBLE_DEVICES",))


def test_the_environment_decides(machine: pytest.MonkeyPatch) -> None:
    _has(machine, "dcu", 4)
    assert devices.find({"DS_ACCELERATOR": "cuda"}).backend == "dcu"
    assert devices.find({"XTRAIN_BACKEND": "fake", "DS_ACCELERATOR": "cuda"}) == Devices("fake", None)
    with pytest.raises(BackendError, match="DS_ACCELERATOR=npu: no such device"):
        devices.find({"DS_ACCELERATOR": "npu"})


def test_another_backend_is_asked_in_a_process_of_its_own() -> None:
    """One process for both: it fails, and its sentence is handed on."""
    with pytest.raises(BackendError, match="unknown backend 'cpuu': did you mean 'cpu'"):
        devices.find({**os.environ, "XTRAIN_BACKEND": "cpuu"})


def test_nvidia_smi_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: H (UUID: GPU-1)'\necho '  MIG 1g: (UUID: MIG-1)'\necho 'GPU 1: H'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert devices._nvidia() == 2


def test_a_host_runs_a_rank_for_each_numa_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "numa_nodes", lambda: {0: [0, 1], 1: [2, 3], 2: [], 3: [2, 3]})
    assert devices.host_ranks({}) == 2
    assert devices.host_ranks({"LOCAL_SIZE": "5"}) == 5
    monkeypatch.setattr(devices, "numa_nodes", dict)
    assert devices.host_ranks({"LOCAL_SIZE": "0"}) == 1
    assert binding.numa_nodes() is not None
