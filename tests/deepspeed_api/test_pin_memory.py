"""Locked host memory: what the kernel counts in /proc/self/status is the judge."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from xtrain.base.errors import BackendError
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
        pin_memory._lock(0, 1 << 16)  # nothing is mapped there
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    assert pin_memory.get_active_native_pinned_memory() is pin_memory.get_native_pinned_memory()
    monkeypatch.delenv("DS_PIN_MEMORY_BACKEND")
    assert pin_memory.get_active_native_pinned_memory() is None
