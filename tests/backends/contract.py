"""What every backend must do, ours or a third party's; a person with the hardware runs this first.

    python -m tests.backends.contract NAME                     one rank
    torchrun --nproc-per-node 2 -m tests.backends.contract NAME    one rank on each of two devices

Each check takes the backend and raises when the promise of a facet is not kept. Expected values come from float64
on the host, from a plain PyTorch loop (tests/training.py), and from the cpu backend.
"""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import xtrain
from tests import training
from xtrain import comm
from xtrain.accelerator import Accelerator
from xtrain.backends import (
    Backend,
    CollectivesFacet,
    MemoryStatistics,
    PrecisionFacet,
    RuntimeFacet,
    ZeroFacet,
    get,
)
from xtrain.base.errors import BackendError
from xtrain.reproducible.aligned_random import random_words

STEPS = 5
CHECKS: dict[str, Callable[[Backend], None]] = {}


class NotHere(Exception):
    """The check cannot be made on this machine; the message says why."""


def check(function: Callable[[Backend], None]) -> Callable[[Backend], None]:
    CHECKS[function.__name__] = function
    return function


def device_of(backend: Backend) -> torch.device:
    return backend.runtime.device(comm.get_local_rank())


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal numbers on the host that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- facets, devices, memory


@check
def facets_answer_with_the_right_types(backend: Backend) -> None:
    assert isinstance(backend.name, str)
    assert backend.name
    for name, kind in (
        ("runtime", RuntimeFacet), ("collectives", CollectivesFacet), ("precision", PrecisionFacet),
        ("zero", ZeroFacet),
    ):  # fmt: skip
        assert isinstance(getattr(backend, name), kind), name
    runtime, precision, zero = backend.runtime, backend.precision, backend.zero
    assert runtime.unavailable_reason() is None
    assert isinstance(runtime.taken_unasked(), bool)
    assert all(isinstance(name, str) for name in runtime.visible_devices_variables)
    assert isinstance(runtime.device(0), torch.device)
    assert runtime.device(0).type == runtime.device_type
    assert runtime.host_memory == (runtime.device_type == "cpu")
    assert isinstance(backend.collectives.process_group_backend, str)
    assert torch.float32 in precision.native_dtypes
    assert all(isinstance(dtype, torch.dtype) for dtype in precision.native_dtypes)
    for lacking, instead in precision.stand_ins.items():
        assert lacking not in precision.native_dtypes
        assert instead in precision.native_dtypes
    assert isinstance(precision.saturates, bool)
    assert 0 <= precision.initial_scale_power <= 32
    assert zero.reduce_bucket_bytes > 0
    assert zero.update_chunk is None or zero.update_chunk > 0
    assert isinstance(zero.overlap_comm, bool)


@check
def a_rank_too_many_is_one_sentence(backend: Backend) -> None:
    count = backend.runtime.device_count()
    if count is None:
        raise NotHere("any number of ranks share the host")
    assert count > comm.get_local_rank()
    with pytest.raises(BackendError) as caught:
        backend.runtime.device(count)
    assert str(count) in str(caught.value)
    assert "\n" not in str(caught.value)


@check
def tensors_come_back_as_they_went(backend: Backend) -> None:
    device = device_of(backend)
    for dtype in (*backend.precision.native_dtypes, torch.int64, torch.int32, torch.uint8, torch.bool):
        there = (draw((33, 7), torch.float64, 1) * 9).to(dtype)
        moved = there.to(device)
        assert moved.device.type == backend.runtime.device_type
        assert torch.equal(moved.cpu(), there), dtype
        octets = moved.reshape(-1).view(torch.uint8)  # how parameters of any dtype are broadcast
        assert torch.equal(octets.cpu(), there.reshape(-1).view(torch.uint8)), dtype
        assert torch.equal(moved[3:9, 2:5].t().contiguous().cpu(), there[3:9, 2:5].t()), dtype


@check
def parameters_keep_their_identity_when_they_move(backend: Backend) -> None:
    """Optimizers and param groups are made before the model is moved."""
    layer = nn.Linear(3, 2)
    weight = layer.weight
    layer.to(device_of(backend))
    assert layer.weight is weight
    weight.data = torch.zeros(4, device=weight.device)
    assert weight.shape == (4,)


@check
def storage_can_be_given_back_and_taken_again(backend: Backend) -> None:
    """ZeRO stage 3 empties the storage of a gathered bucket, and fills it again under the views of it."""
    whole = torch.ones(1000, device=device_of(backend))
    view, nbytes = whole[10:20], whole.nbytes
    whole.untyped_storage().resize_(0)
    assert whole.untyped_storage().size() == 0
    whole.untyped_storage().resize_(nbytes)
    whole.fill_(2.0)
    assert view.sum().item() == 20.0


@check
def memory_is_counted(backend: Backend) -> None:
    runtime = backend.runtime
    before = runtime.memory()
    assert isinstance(before, MemoryStatistics)
    assert 0 < before.free <= before.total
    held = torch.ones(16 * 2**20, device=device_of(backend))  # 64 MiB, written
    runtime.synchronize()
    during = runtime.memory()
    assert during.allocated - before.allocated >= held.nbytes * 0.9
    assert during.peak_allocated >= during.allocated * 0.99
    del held
    runtime.reset_peak_memory()
    assert runtime.memory().peak_allocated < during.peak_allocated


@check
def pinned_memory_holds_the_same_values(backend: Backend) -> None:
    plain = draw((1000,), torch.float32, 2)
    pinned = backend.runtime.pin_memory(plain)
    assert pinned.device.type == "cpu"
    assert torch.equal(pinned, plain)
    there = pinned.to(device_of(backend), non_blocking=True)
    backend.runtime.synchronize()
    assert torch.equal(there.cpu(), plain)
    empty = backend.runtime.pin_memory(torch.zeros(0))
    assert empty.numel() == 0


@check
def streams_wait_for_each_other(backend: Backend) -> None:
    chip, device = Accelerator(backend), device_of(backend)
    side, done = chip.Stream(), chip.Event()
    x = torch.ones(512, 512, device=device)
    side.wait_stream(chip.current_stream())
    with chip.stream(side):
        y = x @ x
        done.record(side)
    done.wait(chip.current_stream())
    assert (y + 1).sum().item() == 512 * 512 * 513
    backend.runtime.synchronize()


# ---------------------------------------------------------------- numbers


@check
def native_dtypes_compute(backend: Backend) -> None:
    """Products forward and backward within the bound of float32 (float64) accumulation, rounded once."""
    backend.precision.exact_float32()
    n = 64
    for dtype in backend.precision.native_dtypes:
        a, b = draw((n, n), dtype, 3), draw((n, n), dtype, 4)
        x, y = a.to(device_of(backend)).requires_grad_(), b.to(device_of(backend))
        product = x @ y
        product.backward(torch.ones_like(product))
        assert product.dtype == dtype
        assert x.grad is not None
        wide = torch.promote_types(dtype, torch.float32)
        relative = n * torch.finfo(wide).eps + (torch.finfo(dtype).eps if wide != dtype else 0.0)
        if dtype == torch.float32:
            relative += inexact(backend)
        for got, left, right in ((product, a, b), (x.grad, torch.ones_like(a), b.t())):
            exact = left.double() @ right.double()
            bound = left.double().abs() @ right.double().abs()
            error = (got.detach().cpu().double() - exact).abs()
            assert bool((error <= relative * bound + 1e-300).all()), f"{dtype}: off by {error.max():.2e}"


@check
def long_sums_are_as_exact_as_claimed(backend: Backend) -> None:
    assert backend.precision.norm_dtype in (torch.float32, torch.float64)
    x = draw((100_000,), torch.float32, 5)
    exact = math.sqrt(math.fsum(value * value for value in x.tolist()))
    norm = torch.linalg.vector_norm(x.to(device_of(backend)).to(backend.precision.norm_dtype)).item()
    assert abs(norm / exact - 1) < math.sqrt(len(x)) * torch.finfo(backend.precision.norm_dtype).eps


@check
def overflow_shows(backend: Backend) -> None:
    if torch.float16 not in backend.precision.native_dtypes:
        raise NotHere("no float16")
    backend.precision.take_overflow()
    doubled = torch.full((16,), 60000.0, dtype=torch.float16, device=device_of(backend)) * 2
    if backend.precision.saturates:
        assert backend.precision.take_overflow()
        assert not backend.precision.take_overflow()
    else:
        assert bool(doubled.isinf().all())


@check
def random_states_are_saved_and_restored(backend: Backend) -> None:
    runtime, device = backend.runtime, device_of(backend)
    state = runtime.get_rng_state()
    assert state.dtype == torch.uint8
    assert state.device.type == "cpu"
    first = torch.rand(100, device=device).cpu()
    second = torch.rand(100, device=device).cpu()
    runtime.set_rng_state(state)
    assert torch.equal(torch.rand(100, device=device).cpu(), first)
    assert not torch.equal(first, second)
    seeded = torch.Generator(device=device).manual_seed(7).get_state()
    runtime.set_rng_state(seeded)
    drawn = torch.rand(100, device=device).cpu()
    assert torch.equal(
        torch.rand(100, device=device, generator=torch.Generator(device=device).manual_seed(7)).cpu(), drawn
    )
    runtime.set_rng_state(state)


@check
def aligned_randomness_is_the_hosts(backend: Backend) -> None:
    """Integer products that wrap, shifts and masks: the same words on each device."""
    here = random_words(1000, 2**63 + 5, (1, 2, 3), torch.device("cpu"))
    assert torch.equal(random_words(1000, 2**63 + 5, (1, 2, 3), device_of(backend)).cpu(), here)


@check
def deterministic_operations_repeat(backend: Backend) -> None:
    device = device_of(backend)
    was, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    backend.runtime.set_deterministic(True)
    try:
        rows = torch.arange(20_000, device=device) % 7
        values = draw((20_000, 8), torch.float32, 6).to(device)
        table = draw((7, 8), torch.float32, 7).to(device)

        def once() -> tuple[torch.Tensor, torch.Tensor]:
            weight = table.clone().requires_grad_()
            nn.functional.embedding(rows, weight).mul(values).sum().backward()
            assert weight.grad is not None
            return weight.grad.cpu(), torch.zeros(7, 8, device=device).index_add_(0, rows, values).cpu()

        first = once()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)


# ---------------------------------------------------------------- ranks


@check
def collectives_move_and_add(backend: Backend) -> None:
    """With the process group that there is; the backend's own library must be there too."""
    device, n, rank = device_of(backend), comm.get_world_size(), comm.get_rank()
    mine = torch.arange(4 * n, dtype=torch.float32, device=device) + rank
    total = mine.clone()
    comm.all_reduce(total)
    expected = torch.arange(4 * n, dtype=torch.float32) * n + n * (n - 1) / 2
    assert torch.equal(total.cpu(), expected)
    part = torch.empty(4, device=device)
    comm.reduce_scatter_tensor(part, mine.clone())
    assert torch.equal(part.cpu(), expected[4 * rank : 4 * rank + 4])
    whole = torch.empty(4 * n, device=device)
    comm.all_gather_into_tensor(whole, part)
    assert torch.equal(whole.cpu(), expected)
    received = torch.empty_like(mine)
    comm.all_to_all_single(received, mine)
    assert torch.equal(received.view(n, 4)[:, 0].cpu(), torch.arange(n) + 4.0 * rank)
    octets = torch.full((5,), rank, dtype=torch.uint8, device=device)
    comm.broadcast(octets, 0)
    assert octets.sum().item() == 0
    everyone: list[Any] = [None] * n
    comm.all_gather_object(everyone, {"rank": rank})
    assert everyone == [{"rank": peer} for peer in range(n)]
    comm.barrier()
    if (reason := backend.collectives.unavailable_reason()) is not None:
        raise NotHere(f"{reason}; tried with {dist.get_backend()} instead")


# ---------------------------------------------------------------- the engine


def settings(backend: Backend, stage: int, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    ranks = comm.get_world_size()
    config = training.config(
        stage,
        micro=training.GLOBAL_BATCH // (2 * ranks),
        bf16=dtype == torch.bfloat16,
        fp16={"enabled": dtype == torch.float16, "initial_scale_power": 8},
    )
    return {**config, **more, "xtrain": {"backend": backend.name, **more.get("xtrain", {})}}


def build(backend: Backend, config: dict[str, Any]) -> Any:
    model = training.build_model()
    return xtrain.initialize(model=model, model_parameters=training.param_groups(model), config=config)[0]


def step(engine: Any, number: int) -> float:
    """One update; the loss averaged over micro-batches and ranks."""
    x, y = (tensor.float().to(engine.device) for tensor in training.samples(number))
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    losses = []
    for index in range(accumulation):
        first = (engine.grid.rank * accumulation + index) * micro
        loss = training.loss_of(engine, x[first : first + micro], y[first : first + micro])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    everyone: list[Any] = [None] * engine.world_size
    comm.all_gather_object(everyone, losses)
    together = list(itertools.chain.from_iterable(everyone))
    return math.fsum(together) / len(together)


def curve(backend: Backend, config: dict[str, Any], steps: int = STEPS) -> tuple[list[float], list[float]]:
    """(losses, learning rates)."""
    engine = build(backend, config)
    assert engine.device.type == backend.runtime.device_type
    losses, rates = [], []
    for number in range(steps):
        rates.append(engine.get_lr()[0])
        losses.append(step(engine, number))
    engine.destroy()
    return losses, rates


def inexact(backend: Backend) -> float:
    """What the chip's float32 products say of themselves that they lose: half a unit in each of two inputs."""
    unit = backend.precision.float32_unit
    assert unit <= 2.0**-7
    return 0.0 if unit == torch.finfo(torch.float32).eps else unit


def close(got: list[float], expected: list[float], relative: float, what: str) -> None:
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert abs(a - b) <= relative * abs(b), f"{what}: step {number + 1}: {a!r}, expected {b!r}"


TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@check
def every_stage_trains_like_pytorch_and_like_the_host(backend: Backend) -> None:
    # A script may ask for a dtype that the chip replaces: its curve is that of the other one, or better.
    asked = {*backend.precision.native_dtypes, *backend.precision.stand_ins} - {torch.float64}
    host = get("cpu")
    for dtype in sorted(asked, key=str):
        for stage in range(4):
            losses, rates = curve(backend, settings(backend, stage, dtype))
            what = f"stage {stage}, {dtype}"
            tolerance = max(TOLERANCE[dtype], inexact(backend))
            close(losses, training.reference(rates)["losses"], tolerance, f"{what}, float64 PyTorch")
            if comm.get_world_size() == 1:
                expected, _ = curve(host, settings(host, stage, dtype))
                close(losses, expected, tolerance, f"{what}, cpu backend")


@check
def parameters_are_aligned_in_their_buffers(backend: Backend) -> None:
    alignment = backend.zero.alignment_bytes
    assert alignment % 16 == 0
    assert alignment & (alignment - 1) == 0
    engine = build(backend, settings(backend, 1))
    for group in engine.partition.trained:
        addresses = [param.data_ptr() for param in group.members]
        assert all((address - group.params.data_ptr()) % alignment == 0 for address in addresses)
        buffers = [group.params.data_ptr(), *(item.buffer.data_ptr() for item in engine.partition.gradients)]
        step(engine, 0)
        # What a captured graph relies on.
        assert addresses == [param.data_ptr() for param in group.members]
        after = [group.params.data_ptr(), *(item.buffer.data_ptr() for item in engine.partition.gradients)]
        assert buffers == after
    engine.destroy()


@check
def states_in_host_memory_train_alike(backend: Backend) -> None:
    for stage, keys in ((1, ["offload_optimizer"]), (3, ["offload_optimizer", "offload_param"])):
        section = training.zero(stage, **{key: {"device": "cpu"} for key in keys})
        plain, _ = curve(backend, settings(backend, stage))
        offloaded, _ = curve(backend, settings(backend, stage, zero_optimization=section))
        close(offloaded, plain, 1e-5, f"stage {stage}, states on the host")


@check
def states_move_to_the_host_and_back(backend: Backend) -> None:
    """offload_states in the middle of an accumulation window, each kind alone: the curve does not change."""
    plain, _ = curve(backend, settings(backend, 1), 2)
    for kind in (None, "lp_params", "lp_grads", "hp_params", "optim_states"):
        engine = build(backend, settings(backend, 1))
        x, y = (tensor.float().to(engine.device) for tensor in training.samples(0))
        micro = engine.train_micro_batch_size_per_gpu()
        for index in range(engine.gradient_accumulation_steps()):
            first = (engine.grid.rank * engine.gradient_accumulation_steps() + index) * micro
            engine.backward(training.loss_of(engine, x[first : first + micro], y[first : first + micro]))
            if index == 0:
                engine.offload_states(include=None if kind is None else [kind])
                engine.reload_states()
            engine.step()
        assert step(engine, 1) == plain[1], kind
        engine.destroy()


@check
def torchs_fused_optimizer_resumes(backend: Backend) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True, "fused": True}}
    train_and_resume(backend, settings(backend, 1, optimizer=optimizer))


@check
def aligned_runs_repeat_in_every_stage(backend: Backend) -> None:
    if backend.precision.norm_dtype != torch.float64 and comm.get_world_size() > 1:
        raise NotHere("norms are not summed in float64, so their last bit depends on how states are cut")
    was, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    try:
        curves = [curve(backend, settings(backend, s, xtrain={"aligned": True}))[0] for s in (0, 0, 1, 2, 3)]
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn)
    assert all(other == curves[0] for other in curves), curves


@check
def a_checkpoint_continues(backend: Backend) -> None:
    train_and_resume(backend, settings(backend, 2))


def train_and_resume(backend: Backend, config: dict[str, Any]) -> None:
    """An interrupted run has the bits of one that went on."""
    folder = [tempfile.mkdtemp() if comm.get_rank() == 0 else ""]
    comm.broadcast_object_list(folder, 0)
    engine = build(backend, config)
    for number in range(2):
        step(engine, number)
    engine.save_checkpoint(folder[0])
    expected = [step(engine, number) for number in (2, 3)]
    engine.destroy()
    resumed = build(backend, config)
    path, _ = resumed.load_checkpoint(folder[0])
    assert path is not None
    assert Path(path).is_dir()
    assert [step(resumed, number) for number in (2, 3)] == expected
    resumed.destroy()
    comm.barrier()
    if comm.get_rank() == 0:
        shutil.rmtree(folder[0])


# ---------------------------------------------------------------- running them


def run(name: str, checks: list[str] | None = None) -> dict[str, tuple[str, str]]:
    """What came of each check: (`ok`, ""), (`not here`, why) or (`FAILED`, traceback). A process group must exist."""
    backend = get(name)
    backend.prepare(comm.get_local_rank())
    results = {}
    for title in checks or CHECKS:
        try:
            CHECKS[title](backend)
        except NotHere as reason:
            results[title] = "not here", str(reason)
        except Exception:
            results[title] = "FAILED", traceback.format_exc()
        else:
            results[title] = "ok", ""
    return results


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m tests.backends.contract NAME\n")
        return 2
    try:
        backend = get(arguments[0])
        backend.prepare(comm.get_local_rank())
    except BackendError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    reason = backend.collectives.unavailable_reason()
    library = backend.collectives.process_group_backend
    if reason is not None and backend.runtime.device_type == "cpu":
        library = "gloo"
    comm.init_distributed(dist_backend=library, verbose=False)
    mine = run(arguments[0])
    everyone: list[Any] = [None] * comm.get_world_size()
    comm.all_gather_object(everyone, mine)
    failed = 0
    for rank, results in enumerate(everyone):
        for title, (outcome, why) in results.items():
            failed += outcome == "FAILED"
            if comm.get_rank() == 0 and (rank == 0 or outcome == "FAILED"):
                print(f"{outcome:<9} rank {rank}  {title.replace('_', ' ')}{f': {why}' if why else ''}")
    if comm.get_rank() == 0:
        print(f"backend {arguments[0]!r}, {len(everyone)} ranks, {library}: {failed} checks failed")
    comm.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
