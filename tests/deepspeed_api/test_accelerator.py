"""The accelerator interface on the host, against torch, the kernel's own numbers and DeepSpeed's host accelerator."""

from __future__ import annotations

import resource

import pytest
import torch

from xtrain.accelerator import Accelerator, get_accelerator
from xtrain.backends import Backend
from xtrain.backends.backend import RuntimeFacet
from xtrain.base.errors import BackendError, ConfigError, NotImplementedYetError


@pytest.fixture
def host() -> Accelerator:
    return get_accelerator()


def test_which_device(host: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.is_available()
    assert host.device_name() == host.device_name(1) == host.current_device_name() == "cpu"
    assert host.device_count() == 1
    assert host.communication_backend_name() == "gloo"
    assert host.on_accelerator(torch.zeros(1))
    assert not host.on_accelerator(torch.zeros(1, device="meta"))
    assert host.lazy_call(lambda: 7) == 7
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert host.current_device() == 3
    monkeypatch.setenv("XTRAIN_BACKEND", "no_such_chip")
    with pytest.raises(BackendError, match="no_such_chip"):
        get_accelerator()


def test_random_numbers(host: Accelerator) -> None:
    before = host.get_rng_state()
    first = torch.rand(3)
    host.set_rng_state(before)
    assert torch.equal(torch.rand(3), first)
    host.manual_seed(11)
    assert host.initial_seed() == torch.initial_seed() == 11
    seeded = torch.rand(3)
    host.manual_seed_all(11)
    assert torch.equal(torch.rand(3, generator=host.default_generator(0)), seeded)
    assert host.random() is torch.random


def test_streams_and_events(host: Accelerator) -> None:
    with host.stream(host.Stream()):
        assert torch.ones(2).sum() == 2
    assert isinstance(host.current_stream(), host.Stream)
    assert isinstance(host.default_stream(), host.Stream)
    host.Event().record()
    host.set_device(0)
    host.synchronize()
    with host.device(0):
        assert host.is_synchronized_device()
    assert not host.is_current_stream_capturing()


def test_ranges_show_in_the_profiler(host: Accelerator) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        host.range_push("outer")
        host.range_push("inner")
        torch.ones(2).sum()
        host.range_pop()
        host.range_pop()
    assert {"outer", "inner"} <= {event.name for event in profile.events()}
    with pytest.raises(ConfigError, match="no range is open"):
        host.range_pop()


def test_memory_is_the_kernels(host: Accelerator) -> None:
    host.reset_peak_memory_stats()
    before = host.memory_allocated()
    held = torch.ones(16 * 2**20)  # 64 MiB, touched
    during = host.memory_allocated()
    assert during - before == pytest.approx(held.nbytes, rel=0.1)
    del held
    assert host.memory_allocated() < during
    peak = host.max_memory_allocated()
    assert peak >= during * 0.99
    assert peak / 1024 <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.01
    stats = host.memory_stats()
    assert stats["allocated_bytes.all.peak"] >= stats["allocated_bytes.all.current"] > 0
    assert host.memory_reserved() == pytest.approx(host.memory_cached(), rel=0.05)
    assert 0 < host.available_memory() < host.total_memory()
    host.empty_cache()


def test_dtypes_come_from_the_backend(host: Accelerator) -> None:
    assert host.supported_dtypes()[0] == torch.float64
    assert host.is_bf16_supported()
    assert host.is_fp16_supported()
    assert host.is_fp64_supported()
    narrow = Accelerator(Backend())  # the base class: float32 and bfloat16
    assert narrow.supported_dtypes() == [torch.float32, torch.bfloat16]
    assert not narrow.is_fp16_supported()
    assert not narrow.is_fp64_supported()
    dtypes = {
        "BFloat16Tensor": torch.bfloat16, "ByteTensor": torch.uint8, "DoubleTensor": torch.float64,
        "FloatTensor": torch.float32, "HalfTensor": torch.float16, "IntTensor": torch.int32,
        "LongTensor": torch.int64,
    }  # fmt: skip
    for name, dtype in dtypes.items():
        assert getattr(host, name)([1]).dtype == dtype


def test_pinned_memory_on_a_host_is_plain_memory(host: Accelerator) -> None:
    tensor = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert host.pin_memory(tensor) is tensor
    assert host.pin_empty(4, 5, dtype=torch.int32).shape == (4, 5)
    like = host.pin_empty_like(tensor)
    assert (like.shape, like.dtype) == (tensor.shape, tensor.dtype)
    assert not host.is_pinned(like)
    with pytest.raises(ConfigError, match="device must be 'cpu'"):
        host.pin_empty(1, dtype=torch.float32, device="meta")


def test_variables_that_limit_devices_are_the_backends(host: Accelerator) -> None:
    class Runtime(RuntimeFacet):
        visible_devices_variables = ("CHIP_VISIBLE",)

    class Chip(Backend):
        runtime = Runtime()

    environment: dict[str, str] = {}
    host.set_visible_devices_envs(environment, [0, 2])
    assert environment == {}
    Accelerator(Chip()).set_visible_devices_envs(environment, [0, 2])
    assert environment == {"CHIP_VISIBLE": "0,2"}


def test_compilers_and_kernels(host: Accelerator) -> None:
    from xtrain.ops import op_builder

    host.set_compile_backend("eager")
    assert host.get_compile_backend() == "eager"
    host.set_compile_backend("inductor")
    with pytest.raises(ConfigError, match="backend 'no_such'"):
        host.set_compile_backend("no_such")
    assert not host.is_triton_supported()
    for refused in (host.create_graph, host.op_builder_dir):
        with pytest.raises(NotImplementedYetError):
            refused()
    assert host.get_op_builder("FusedAdamBuilder") is op_builder.FusedAdamBuilder
    assert host.create_op_builder("FusedAdamBuilder").is_compatible()
    # Scripts ask for a class at their top, and load it only where they want the kernel.
    assert host.get_op_builder("FlashAttentionBuilder") is op_builder.NotImplementedBuilder
    with pytest.raises(NotImplementedYetError, match="the compiled operator"):
        host.create_op_builder("FlashAttentionBuilder").load()


@pytest.mark.deepspeed
def test_it_answers_as_deepspeeds_host_accelerator(
    host: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pytest.importorskip("deepspeed.accelerator.cpu_accelerator", reason="needs the extra deepspeed")
    theirs = module.CPU_Accelerator()
    for name in (
        "is_available", "device_name", "current_device_name", "communication_backend_name", "use_host_timers",
        "is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure", "total_memory",
        "is_bf16_supported", "is_fp64_supported", "is_triton_supported", "get_compile_backend", "export_envs",
        "prefer_triton_grouped_mm", "is_current_stream_capturing", "pin_memory_alignment", "build_extension",
    ):  # fmt: skip
        assert getattr(host, name)() == getattr(theirs, name)(), name
    assert set(theirs.supported_dtypes()) <= set(host.supported_dtypes())
    assert host.memory_allocated() == pytest.approx(theirs.memory_allocated(), rel=0.05)
    assert torch.equal(host.get_rng_state(), theirs.get_rng_state())
