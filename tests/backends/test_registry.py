"""Choosing a backend."""

from __future__ import annotations

import pytest
import torch

from xtrain.backends import available, backend, detect, get, names, registry
from xtrain.base.errors import BackendError


def test_names_and_detection() -> None:
    assert "cpu" in names()
    assert detect().name == "cpu"
    assert available()["cpu"] is None
    assert torch.bfloat16 in get("cpu").precision.native_dtypes


def test_environment_and_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "npu")
    with pytest.raises(BackendError, match="'ascend' cannot be used here: torch_npu is not installed"):
        detect()
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    with pytest.raises(BackendError, match=r"'cuda' cannot be used here: PyTorch .* is built without CUDA"):
        detect()
    assert detect("fake").name == "fake"
    monkeypatch.setenv("XTRAIN_BACKEND", "cpu")
    assert detect().name == "cpu"
    with pytest.raises(BackendError, match="did you mean 'cpu'"):
        detect("cpuu")


class Broken(backend.Backend):
    name = "broken"

    class _Runtime(backend.RuntimeFacet):
        def unavailable_reason(self) -> str:
            return "its driver is missing"

    runtime = _Runtime()


class Chip(backend.Backend):
    name = "chip"


def test_plugins_are_found_preferred_and_refused_with_their_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, kind: type[backend.Backend]) -> None:
            self.kind = kind

        def load(self) -> type[backend.Backend]:
            return self.kind

    plugins = {"broken": Entry(Broken)}
    registry._load.cache_clear()
    monkeypatch.setattr(registry, "_plugins", lambda: plugins)
    try:
        assert detect().name == "cpu"
        assert available()["broken"] == "its driver is missing"
        with pytest.raises(BackendError, match="cannot be used here: its driver is missing"):
            get("broken")
        plugins["chip"] = Entry(Chip)
        assert detect().name == "chip"
    finally:
        registry._load.cache_clear()
