"""The chips' modules on a host: torch.cuda and torch_npu are replaced by their answers, nothing else is."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import xtrain
from tests import training
from xtrain.backends import Backend, ascend, cuda, dcu, get, registry
from xtrain.backends.cpu import CpuBackend, CpuPrecision
from xtrain.base.errors import BackendError, ConfigError
from xtrain.config.schema import Config, Fp16Config
from xtrain.precision import for_backend, make_loss_scale, make_policy


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Two V100."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    return monkeypatch


@pytest.fixture
def npus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Eight Ascend 910A: they saturate and have no bfloat16."""
    npu = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 8,
        is_bf16_supported=lambda: False,
        utils=SimpleNamespace(is_support_inf_nan=lambda: False),
        flag=True,
        matmul=SimpleNamespace(allow_hf32=True),
        conv=SimpleNamespace(allow_hf32=True),
    )
    npu.get_npu_overflow_flag = lambda: npu.flag
    npu.clear_npu_overflow_flag = lambda: setattr(npu, "flag", False)
    module = ModuleType("torch_npu")
    module.__spec__ = ModuleSpec("torch_npu", None)
    module.npu = npu  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    monkeypatch.setattr(torch, "get_device_module", lambda name: {"npu": npu}[name])
    return npu


def test_detection_takes_the_chip_that_is_there(gpus: pytest.MonkeyPatch) -> None:
    assert registry.detect().name == "cuda"
    gpus.setenv("DS_ACCELERATOR", "cuda")
    gpus.setattr(torch.version, "hip", "6.3")
    assert registry.detect().name == "dcu"  # DeepSpeed's name for it
    with pytest.raises(
        BackendError, match=r"'cuda' cannot be used here: PyTorch .* is built for HIP, .*use backend 'dcu'"
    ):
        get("cuda")
    gpus.setattr(torch.cuda, "is_available", lambda: False)
    gpus.setenv("HIP_VISIBLE_DEVICES", "7")
    with pytest.raises(BackendError, match=r"no DCU answers \(HIP_VISIBLE_DEVICES='7'\)"):
        get("dcu")


def test_a_rank_without_a_device_is_told_how_many_there_are(gpus: pytest.MonkeyPatch) -> None:
    gpus.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    runtime = get("cuda").runtime
    assert runtime.device(1) == torch.device("cuda:1")
    with pytest.raises(
        BackendError, match=r"local rank 2 .* sees 2 of type 'cuda' \(CUDA_VISIBLE_DEVICES='2,5'\)"
    ):
        runtime.set_device(2)


def test_cuda_knows_which_chips_have_bfloat16(gpus: pytest.MonkeyPatch) -> None:
    precision = cuda.CudaPrecision()
    assert torch.bfloat16 not in precision.native_dtypes
    assert precision.stand_ins == {torch.bfloat16: torch.float32}
    gpus.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert torch.bfloat16 in precision.native_dtypes
    assert precision.stand_ins == {}


@pytest.mark.parametrize(
    ("arch", "has"),
    [("gfx906:sramecc+:xnack-", False), ("gfx926", False), ("gfx928", True), ("gfx90a:sramecc+", True)],
)
def test_dcu_asks_the_architecture(gpus: pytest.MonkeyPatch, arch: str, has: bool) -> None:
    gpus.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    assert (torch.bfloat16 in dcu.DcuPrecision().native_dtypes) is has


def test_exact_float32_and_determinism_are_switched_on(gpus: pytest.MonkeyPatch) -> None:
    gpus.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        cuda.CudaPrecision().exact_float32()
        assert not matmul.allow_tf32
        assert not cudnn.allow_tf32
        cuda.CudaRuntime().set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_ascend_asks_torch_npu(npus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = get("ascend")
    with pytest.raises(
        BackendError, match="local rank 8 has no device of its own: this process sees 8 of type 'npu'"
    ):
        backend.runtime.device(8)
    assert backend.precision.native_dtypes == {torch.float32, torch.float16}
    assert backend.precision.saturates
    assert backend.precision.take_overflow()
    assert not backend.precision.take_overflow()
    backend.precision.exact_float32()
    assert (npus.matmul.allow_hf32, npus.conv.allow_hf32) == (False, False)
    npus.is_available = lambda: False
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "9")
    with pytest.raises(BackendError, match=r"no NPU answers \(ASCEND_RT_VISIBLE_DEVICES='9'\)"):
        get("ascend")


def test_a_torch_npu_that_does_not_import_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("libhccl.so: cannot open shared object file\nsecond line")

    monkeypatch.setattr(ascend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ascend.importlib, "import_module", fail)
    reason = ascend.AscendRuntime().unavailable_reason()
    assert reason is not None
    assert reason.startswith(
        "torch_npu does not import (ImportError: libhccl.so: cannot open shared object file): "
    )


# ---------------------------------------------------------------- what the engine makes of the answers


class NoBfloat16(CpuPrecision):
    native_dtypes = frozenset({torch.float32, torch.float16})
    stand_ins = {torch.bfloat16: torch.float32}


class Old(CpuBackend):
    name = "old"
    precision = NoBfloat16()


def _policy(backend: Backend, **sections: Any) -> Any:
    config = Config.model_validate(sections)
    return for_backend(make_policy(config), config, backend)


def test_a_dtype_that_the_chip_lacks_is_replaced_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="xtrain"):
        policy = _policy(Old(), bf16={"enabled": True})
    assert policy.module == torch.float32
    assert (
        "backend 'old' has no bfloat16 on this chip: the model is trained in float32 instead" in caplog.text
    )
    assert _policy(Old(), fp16={"enabled": True}).module == torch.float16
    with pytest.raises(
        ConfigError, match=r"'torch_autocast.dtype' asks for bfloat16.*use one of float16, float32"
    ):
        _policy(Old(), torch_autocast={"enabled": True})


def test_a_dtype_without_a_replacement_is_refused(npus: SimpleNamespace) -> None:
    with pytest.raises(
        ConfigError, match=r"asks for bfloat16, which backend 'ascend' does not compute in on this chip"
    ):
        _policy(get("ascend"), bf16={"enabled": True})


def test_defaults_of_the_backend_give_way_to_the_config() -> None:
    sunway = get("sunway")
    assert _policy(sunway, bf16={"enabled": True}).accumulation == torch.float32
    given = _policy(sunway, bf16={"enabled": True}, data_types={"grad_accum_dtype": "bf16"})
    assert given.accumulation == torch.bfloat16
    assert make_loss_scale(Fp16Config(enabled=True), initial_power=12).value == 2.0**12
    assert make_loss_scale(Fp16Config(enabled=True, initial_scale_power=9), initial_power=12).value == 2.0**9


class Saturating(CpuPrecision):
    """Counts an overflow in every third step, on rank 1 only."""

    saturates = True
    asked = 0

    def take_overflow(self) -> bool:
        self.asked += 1
        return self.asked % 3 == 0 and xtrain.comm.get_rank() == 1


def _skipped() -> list[bool]:
    registry._load("cpu").precision = Saturating()
    try:
        fp16 = {"enabled": True, "initial_scale_power": 4}
        engine, *_ = xtrain.initialize(
            model=training.build_model(), config=training.config(1, micro=8, fp16=fp16)
        )
        applied = []
        for step in range(6):
            training.engine_step(engine, step)
            applied.append(engine.was_step_applied())
        return applied
    finally:
        registry._load.cache_clear()


def test_overflow_that_only_a_flag_shows_skips_the_step_on_every_rank(ranks: Any) -> None:
    assert ranks(2, _skipped) == [[True, True, False, True, True, False]] * 2


def test_a_checkpoint_of_another_kind_of_device_leaves_the_generator_alone(ranks: Any, tmp_path: Any) -> None:
    ranks(1, _resume_from_another_device, str(tmp_path))


def _resume_from_another_device(folder: str) -> None:
    class Runtime(CpuBackend.runtime.__class__):  # type: ignore[name-defined,misc]
        def get_rng_state(self) -> torch.Tensor:
            return torch.zeros(16, dtype=torch.uint8)  # the size of CUDA's

    backend = registry._load("cpu")
    original = backend.runtime
    engine, *_ = xtrain.initialize(model=training.build_model(), config=training.config(1, micro=16))
    backend.runtime = Runtime()
    engine.train_state.device = torch.device("meta")  # what the checkpoint says it was written on
    try:
        engine.save_checkpoint(folder)
    finally:
        backend.runtime = original
        engine.train_state.device = torch.device("cpu")
    before = torch.get_rng_state()
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    assert torch.equal(torch.get_rng_state(), before)
