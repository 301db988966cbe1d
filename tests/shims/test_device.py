"""The device shim on the host: what CUDA's names do, that nothing is forgotten, and that it can be taken back."""

from __future__ import annotations

import copy
import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from xtrain.base.errors import BackendError, ConfigError, NotImplementedYetError
from xtrain.shims import cuda_names as names
from xtrain.shims import process
from xtrain.shims.device import host_names

Ranks = Callable[..., list[Any]]


def shimmed(function: Callable[..., Any], *args: Any) -> Any:
    """What a rank runs: the function, with the shim active."""
    process.install("on")
    try:
        return function(*args)
    finally:
        process.uninstall()


def _snapshot() -> dict[str, dict[str, Any]]:
    owners = {
        "torch": torch, "cuda": torch.cuda, "Tensor": torch.Tensor, "dist": dist, "amp": torch.amp, "fft": torch.fft,
        "c10d": dist.distributed_c10d, "memory": torch.cuda.memory, "random": torch.cuda.random,
        "autocast": torch.amp.autocast, "scaler": torch.amp.GradScaler, "DDP": nn.parallel.DistributedDataParallel,
        "cuda.amp": torch.cuda.amp, "nvtx": torch.cuda.nvtx, "storage": torch.UntypedStorage,
    }  # fmt: skip
    return {name: dict(vars(owner)) for name, owner in owners.items()}


def _come_and_go() -> int:
    before = _snapshot()
    process.install("on")
    during = _snapshot()
    process.uninstall()
    after = _snapshot()
    assert before.keys() == after.keys()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        assert all(after[name][key] is value for key, value in attributes.items()), name
    return sum(during[name].get(key) is not value for name in before for key, value in before[name].items())


def test_it_can_be_taken_back(ranks: Ranks) -> None:
    assert ranks(1, _come_and_go)[0] > 150


def test_every_name_of_torch_cuda_has_its_place() -> None:
    placed = [*host_names.implemented(), *names.KEPT, *names.REFUSED, *names.TENSOR_TYPES]
    assert len(placed) == len(set(placed))
    assert set(torch.cuda.__all__) <= set(placed)


def _refusals() -> None:
    for name in names.REFUSED:
        if name not in (
            "comm",
            "nccl",
            "gds",
            "green_contexts",
            "graphs",
            "jiterator",
            "tunable",
            "profiler",
        ):
            with pytest.raises(NotImplementedYetError, match=rf"torch\.cuda\.{name} on this backend"):
                getattr(torch.cuda, name)()
    with pytest.raises(NotImplementedYetError, match=r"torch\.cuda\.nccl\.version .* use torch\.distributed"):
        torch.cuda.nccl.version()
    with pytest.raises(NotImplementedYetError, match=r"torch\.cuda\.profiler\.start .* use torch\.profiler"):
        torch.cuda.profiler.start()
    with pytest.raises(BackendError, match=r"set_device\(-1\)"):
        torch.cuda.set_device(-1)


def test_names_without_a_meaning_are_refused(ranks: Ranks) -> None:
    ranks(1, shimmed, _refusals)


def _words() -> None:
    own = torch.device("cpu")
    for word in (
        "cuda",
        "cuda:0",
        "cuda:7",
        0,
        torch.device("cuda"),
        torch.device("cuda", 3),
        torch.device("cuda:1"),
    ):
        for tensor in (
            torch.zeros(2, device=word), torch.tensor([1.0], device=word), torch.as_tensor([1], device=word),
            torch.ones(2).to(word), torch.ones(2).to(device=word), torch.ones(2).to(word, torch.half),
            torch.empty_like(torch.ones(2), device=word), torch.ones(2).new_zeros(3, device=word),
            torch.rand(2, generator=torch.Generator(device=word), device=word), torch.arange(3, device=word),
            nn.Linear(2, 2, device=word).weight, nn.Linear(2, 2).to(word).weight, torch.fft.fftfreq(4, device=word),
        ):  # fmt: skip
            assert tensor.device == own == torch.device(word)
            assert tensor.is_cuda
    assert nn.Linear(2, 2).cuda(0).weight.get_device() == 0
    assert torch.ones(2).to(torch.float64).dtype == torch.float64
    assert torch.empty(2, device="meta").to("meta").is_meta
    assert not torch.empty(2, device="meta").is_cuda
    with torch.device("cuda"):
        assert torch.ones(1).device == own
    assert torch.empty(2, pin_memory=True).pin_memory().device == own
    assert isinstance(own, torch.device)
    assert pickle.loads(pickle.dumps(own)) == copy.deepcopy(own) == own
    with pytest.raises(RuntimeError, match="nonsense"):
        torch.zeros(1, device="nonsense")


def test_words_for_devices(ranks: Ranks) -> None:
    ranks(1, shimmed, _words)


def _types() -> None:
    half, full = torch.cuda.HalfTensor([1.0]), torch.cuda.FloatTensor(2, 3)
    assert (half.type(), full.type()) == ("torch.cuda.HalfTensor", "torch.cuda.FloatTensor")
    assert isinstance(half, torch.cuda.HalfTensor)
    assert not isinstance(half, torch.cuda.FloatTensor)
    assert (
        half.type("torch.cuda.DoubleTensor").dtype
        == half.type(torch.cuda.DoubleTensor).dtype
        == torch.float64
    )
    torch.set_default_tensor_type("torch.cuda.DoubleTensor")
    try:
        assert torch.ones(1).dtype == torch.float64
    finally:
        torch.set_default_tensor_type("torch.FloatTensor")


def test_tensor_types(ranks: Ranks) -> None:
    ranks(1, shimmed, _types)


def _copies() -> None:
    """Where CUDA would copy between host and device, later changes of one do not show in the other."""
    weight = torch.ones(3)
    for saved in (weight.cpu(), weight.to("cpu"), weight.detach().cpu()):
        weight += 1
        assert not saved.equal(weight)
    array = np.ones(3, dtype=np.float32)
    moved, moved_too = torch.from_numpy(array).cuda(), torch.from_numpy(array).to("cuda:0", non_blocking=True)
    array[:] = 5
    assert moved.tolist() == moved_too.tolist() == [1, 1, 1]
    assert weight.cuda() is weight  # a tensor on the device is not copied
    parameter = nn.Parameter(torch.ones(2))
    assert parameter.cuda() is parameter
    module = nn.Linear(2, 2)
    module.cuda().cpu()
    assert module.weight.is_leaf


def test_what_cuda_copies_is_copied(ranks: Ranks) -> None:
    ranks(1, shimmed, _copies)


def _files(folder: Path) -> None:
    file = io.BytesIO()
    torch.save({"x": torch.arange(3.0)}, file)
    for place in (
        None,
        "cuda",
        "cuda:1",
        torch.device("cuda"),
        {"cuda:0": "cuda:1"},
        lambda storage, _: storage,
    ):
        file.seek(0)
        assert torch.load(file, map_location=place)["x"].tolist() == [0, 1, 2]
    file = io.BytesIO()
    torch.save([torch.ones(1).to(torch.device("cpu")), torch.device("cuda")], file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[1] == torch.device("cpu")


def test_files(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, shimmed, _files, tmp_path)


def _from_cuda(path: Path) -> None:
    """A file that was written on CUDA: its storages are labelled so."""
    assert torch.load(path)["x"].tolist() == [1.0, 2.0]
    assert torch.load(path, map_location={"cuda:1": "cpu"})["x"].tolist() == [1.0, 2.0]


def _write_as_cuda(path: Path) -> None:
    torch.serialization.register_package(0, lambda storage: "cuda:1", lambda storage, location: None)
    try:
        torch.save({"x": torch.tensor([1.0, 2.0])}, path)
    finally:
        torch.serialization._package_registry.pop(0)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(path)


def test_files_of_cuda(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, _write_as_cuda, tmp_path / "x.pt")
    ranks(1, shimmed, _from_cuda, tmp_path / "x.pt")


def _streams_and_time() -> None:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.cuda.Stream()
    with pytest.raises(RuntimeError, match="must be recorded"):
        begin.elapsed_time(end)
    begin.record()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() is side
        time.sleep(0.02)
    side.record_event(end)
    torch.cuda.current_stream().wait_event(end)
    assert torch.cuda.current_stream() is torch.cuda.default_stream()
    torch.cuda.synchronize()
    assert 20 <= begin.elapsed_time(end) < 2000
    assert end.query()
    with pytest.raises(RuntimeError, match="enable_timing"):
        torch.cuda.Event().elapsed_time(end)
    torch.ones(2).record_stream(side)
    with torch.cuda.nvtx.range("part"):
        assert torch.cuda.nvtx.range_push("inner") == 0
        assert torch.cuda.nvtx.range_pop() == 0


def test_streams_and_events(ranks: Ranks) -> None:
    ranks(1, shimmed, _streams_and_time)


def _random() -> None:
    torch.cuda.manual_seed(5)
    assert torch.cuda.initial_seed() == 5
    state = torch.cuda.get_rng_state()
    first = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.rand(4, device="cuda").equal(first)
    every = torch.cuda.get_rng_state_all()
    second = torch.rand(4)
    torch.cuda.set_rng_state_all(every)
    assert torch.rand(4).equal(second)
    torch.cuda.default_generators[3].set_state(state)
    assert torch.rand(4).equal(first)
    called: list[int] = []
    torch.cuda._lazy_call(lambda: called.append(1))
    assert called == [1]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.random.fork_rng(devices=[0, 1]):
        torch.rand(9)
    assert torch.rand(3).equal(expected)


def test_random_states(ranks: Ranks) -> None:
    ranks(1, shimmed, _random)


def _numbers_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, count in (("0", 1), ("0,3", 2), ("", 0), ("-1", 0), ("1,-1,2", 1)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert torch.cuda.device_count() == count
        assert torch.cuda.is_available() == (count > 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert torch.cuda.device_count() == len(torch.cuda.default_generators) == 4
    with torch.cuda.device(2):
        assert torch.cuda.current_device() == 2
        with torch.cuda.device(None):
            assert torch.cuda.current_device() == 2
    torch.cuda.set_device("cuda:1")
    assert torch.cuda.current_device() == torch.ones(1).get_device() == 1
    torch.cuda.set_device(torch.device("cuda"))
    assert torch.cuda.current_device() == 1
    torch.cuda.set_device(0)
    assert torch.cuda.get_device_capability() == (0, 0)
    assert torch.cuda.get_device_properties(0).total_memory == torch.cuda.mem_get_info()[1] > 2**20
    assert 0 < torch.cuda.memory_allocated() <= torch.cuda.max_memory_allocated()
    assert torch.cuda.is_bf16_supported()


def _with_patch(function: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        function(patch)


def test_devices_and_their_number(ranks: Ranks) -> None:
    ranks(1, shimmed, _with_patch, _numbers_of_devices)


def _torch_is_told_the_truth() -> None:
    assert torch.cuda.is_available()
    assert not eval("torch.cuda.is_available()", {"torch": torch, "__name__": "torch.utils.data"})
    assert not eval("x.is_cuda", {"x": torch.ones(1), "__name__": "torch.nn"})
    # Parts of torch that ask whether CUDA is there.
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loader = torch.utils.data.DataLoader(torch.arange(4), batch_size=2, pin_memory=True)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]
    compiled = torch.compile(lambda x: torch.zeros(2, device="cuda") + x.to("cuda"), backend="aot_eager")
    assert compiled(torch.ones(2)).tolist() == [1, 1]
    checkpointed = torch.utils.checkpoint.checkpoint(
        model, torch.ones(2, 4, requires_grad=True), use_reentrant=False
    )
    checkpointed.sum().backward()


@torch.no_grad()
def _scripted() -> None:
    module: dict[str, Any] = {"__name__": "scripted"}
    source = "import torch\n@torch.jit.script\ndef f(x):\n    return x + torch.ones([2], device=x.device)\n"
    file = Path("scripted_for_the_shim.py").absolute()
    file.write_text(source)
    exec(compile(source, str(file), "exec"), module)
    assert module["f"](torch.ones(2)).tolist() == [2, 2]


def _in_folder(function: Callable[[], None], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        function()


def test_torchs_own_code(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, shimmed, _torch_is_told_the_truth)
    ranks(1, shimmed, _in_folder, _scripted, tmp_path)


def _mixed_precision() -> None:
    a = torch.ones(2, 2, device="cuda")
    with torch.cuda.amp.autocast():
        assert (a @ a).dtype == torch.get_autocast_gpu_dtype() == torch.float16
        assert torch.is_autocast_enabled()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled()
    scaler = torch.cuda.amp.GradScaler(init_scale=8.0)
    assert scaler.is_enabled()
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler.scale((weight * 3).sum()).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [24, 24]
    scaler.step(optimizer)
    scaler.update()
    assert weight.tolist() == [-2, -2]

    class Double(torch.autograd.Function):
        @staticmethod
        @torch.cuda.amp.custom_fwd
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        @torch.cuda.amp.custom_bwd
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * 2

    x = torch.ones(1, requires_grad=True)
    Double.apply(x).backward()
    assert x.grad is not None
    assert x.grad.item() == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mixed_precision(ranks: Ranks) -> None:
    ranks(1, shimmed, _mixed_precision)


def _collectives() -> float:
    group = dist.new_group(backend="nccl")
    assert dist.is_nccl_available()
    x = torch.ones(1, device="cuda") * (dist.get_rank() + 1)
    dist.all_reduce(x, group=group)
    dist.barrier(device_ids=[torch.cuda.current_device()])
    mesh = dist.init_device_mesh("cuda", (2,))
    assert mesh.device_type == "cpu"
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1).cuda(), device_ids=[0], output_device=0)
    model(x[None]).sum().backward()
    return x.item()


def test_collectives(ranks: Ranks) -> None:
    assert ranks(2, shimmed, _collectives) == [3, 3]


def _kernels(folder: Path) -> None:
    from torch.utils import cpp_extension

    for build in (cpp_extension.load, cpp_extension.CUDAExtension):
        with pytest.raises(NotImplementedYetError, match=r"the CUDA .* fused"):
            build("fused", ["a.cpp", "a.cu"])
    with pytest.raises(NotImplementedYetError, match="the CUDA kernel fused"):
        cpp_extension.load_inline("fused", "", cuda_sources="__global__ void f() {}")
    assert cpp_extension.CppExtension("plain", ["a.cpp"]).sources == ["a.cpp"]


def test_cuda_kernels_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1, shimmed, _kernels, tmp_path)


def _modes() -> None:
    with pytest.raises(ConfigError, match="choose one of auto, on, off"):
        process.install("maybe")
    process.install("off")
    try:
        assert not torch.cuda.is_available()
        with pytest.raises(ConfigError, match="installed already with 'off'"):
            process.install("on")
    finally:
        process.uninstall()


def test_modes(ranks: Ranks) -> None:
    ranks(1, _modes)
