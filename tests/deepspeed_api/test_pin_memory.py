"""Locked host memory: what the kernel counts in /proc/self/status is the judge."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from xtrain.backends import locked_memory
from xtrain.base.errors import BackendError, NotImplementedYetError
from xtrain.ops.op_builder import PinMemoryBuilder
from xtrain.utils import pin_memory


def _locked_kib() -> int:
    found = re.search(r"VmLck:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what is locked")
def test_memory_is_locked_as_long_as_a_tensor_lies_in_it() -> None:
    pins, before = pin_memory.NativePinnedMemory(), _locked_kib()
    pinned = pins.pin(torch.arange(1 << 16, dtype=torch.float32).view(256, 256))
    assert _locked_kib() == before + 256
    assert pinned[1, 2] == 258.0
    row = pinned[3]
    del pinned
    gc.collect()
    assert pins.is_pinned(row)
    assert float(row[0]) == 768.0
    assert _locked_kib() == before + 256
    del row
    gc.collect()
    assert _locked_kib() == before


def test_unlocking_leaves_the_values() -> None:
    pins, before = pin_memory.NativePinnedMemory(), _locked_kib()
    pinned = pins.pin(torch.full((4096,), 7.0), match_shape=False)
    view = pinned[5:]
    pinned.data = torch.zeros(3)  # as where states move to another device
    assert pins.unpin(pinned)
    assert not pins.unpin(pinned)
    assert not pins.is_pinned(view)
    assert _locked_kib() == before
    assert bool((view == 7.0).all())
    assert not pins.is_pinned(torch.ones(3))
    assert not pins.is_pinned(torch.ones(3, device="meta"))
    assert not pins.unpin(torch.ones(3))


def test_what_the_kernel_refuses_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match=r"65536 bytes of memory cannot be locked \(.+\): .*ulimit -l"):
        locked_memory._lock(0, 1 << 16)  # nothing is mapped there
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    assert pin_memory.get_active_native_pinned_memory() is pin_memory.get_native_pinned_memory()
    monkeypatch.delenv("DS_PIN_MEMORY_BACKEND")
    assert pin_memory.get_active_native_pinned_memory() is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what is locked")
def test_the_operator_locks_memory() -> None:
    handle, before = PinMemoryBuilder().load().pin_handle(), _locked_kib()
    assert xtrain.ops.__compatible_ops__[PinMemoryBuilder.NAME]
    locked = handle.new_cpu_locked_tensor(1 << 16, torch.empty(0))
    assert (locked.shape, locked.dtype, _locked_kib()) == ((1 << 16,), torch.float32, before + 256)
    assert handle.is_pinned(locked[5:])
    assert handle.free_cpu_locked_tensor(locked)
    assert not handle.free_cpu_locked_tensor(torch.ones(3))
    assert _locked_kib() == before
    with pytest.raises(NotImplementedYetError, match="pin_memory"):
        PinMemoryBuilder().builder()


def _offloads(stage: int, native: bool) -> tuple[list[int], list[float]]:
    """(KiB locked by the engine: before a step, after one, after destroy(); weights)"""
    if native:
        os.environ["DS_PIN_MEMORY_BACKEND"] = "native"
    gc.collect()
    before, locked = _locked_kib(), []
    torch.manual_seed(0)
    model = nn.Linear(256, 256, bias=False)
    offload = {"device": "cpu", "pin_memory": True}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "offload_optimizer": offload},
    }
    engine = xtrain.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    locked.append(_locked_kib() - before)
    engine.backward(engine(torch.ones(1, 256)).square().sum())
    engine.step()
    locked.append(_locked_kib() - before)
    weights = engine.module_state_dict()["weight"].flatten()[:50].tolist()
    engine.destroy()
    locked.append(_locked_kib() - before)
    os.environ.pop("DS_PIN_MEMORY_BACKEND", None)
    return locked, weights


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not say what is locked")
@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_states_are_locked_where_the_environment_says_so(ranks: Any, stage: int) -> None:
    """Masters of 256 KiB, then two states more; the same numbers as without."""
    plain, locked = (ranks(1, _offloads, stage, native)[0] for native in (False, True))
    assert plain[0] == [0, 0, 0]
    assert locked == ([256, 768, 0], plain[1])
