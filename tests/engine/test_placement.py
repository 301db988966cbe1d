"""Whatever lies inside a larger block begins where a tensor in memory of its own may begin: kernels round by that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import xtrain
from tests import toys, training
from xtrain.activation_checkpointing.activations import Arena
from xtrain.backends.alignment import HOST_BYTES, aligned_unit, is_aligned, round_up
from xtrain.zero.offload import DiskMemory

DTYPES = [
    torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32, torch.int64,
    torch.float64, torch.complex64, torch.complex128,
]  # fmt: skip


def _address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() % HOST_BYTES


@given(
    st.integers(0, 10_000),
    st.sampled_from([64, 128, 256, 512]),
    st.lists(st.sampled_from(DTYPES), min_size=1),
)
def test_a_rounded_position_is_aligned_in_every_dtype(
    position: int, bytes_: int, dtypes: list[torch.dtype]
) -> None:
    unit = aligned_unit(bytes_, *dtypes)
    placed = round_up(position, unit)
    assert position <= placed < position + unit
    assert all(placed * dtype.itemsize % bytes_ == 0 for dtype in dtypes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchs_host_memory_begins_aligned(dtype: torch.dtype) -> None:
    """All blocks come from these calls: a test of torch's promise, which nothing here could replace."""
    for elements in (1, 3, 17, 1001, 70_001):
        made = torch.empty(elements, dtype=dtype)
        view = torch.empty(elements + 1, dtype=dtype)[1:]
        kept = [made, torch.zeros_like(made), made.new_empty(elements), made.clone(), view.clone()]
        resized = torch.empty(elements, dtype=dtype)
        resized.untyped_storage().resize_(0)
        resized.untyped_storage().resize_(elements * dtype.itemsize)
        assert {_address(tensor) for tensor in [*kept, resized]} == {0}


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_activations_are_aligned(dtype: torch.dtype) -> None:
    arena, flat = Arena(3), torch.zeros(15, dtype=dtype)
    rows = [arena.place(0, flat, flat.device) for _ in range(3)]
    assert {_address(row) for row in rows} == {0}
    assert {tuple(row.shape) for row in rows} == {(15,)}
    assert len({row.untyped_storage().data_ptr() for row in rows}) == 1  # one block all the same
    wide = Arena(2, 512)
    first, second = (wide.place(0, flat, flat.device) for _ in range(2))
    assert (second.data_ptr() - first.data_ptr()) % 512 == 0


def _engine_addresses(stage: int, communication: str | None, folder: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}

    def note(what: str, *tensors: torch.Tensor | None) -> None:
        found.setdefault(what, set()).update(_address(t) for t in tensors if t is not None and t.numel())

    torch.manual_seed(0)
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": folder}} if stage else {}
    options = {
        "zero_optimization": training.zero(stage, **offload),
        **({"communication_data_type": communication} if communication else {}),
    }
    model = toys.MixedDtypes()
    seen = training.config(stage, micro=8, **options)
    engine = xtrain.initialize(model=model, config=seen)[0]
    model.frozen.register_forward_pre_hook(lambda module, args: note("gathered", *module.parameters()))
    model.low.register_forward_pre_hook(lambda module, args: note("gathered", *module.parameters()))
    for group in engine.partition.trained:
        for bucket in group.layout.buckets:
            note("slices", group.slice_of(bucket))
            sent = 2 if communication else group.dtype.itemsize
            width = (bucket.stop - bucket.start) // group.layout.partitions
            found.setdefault("sent", set()).add(width * sent % HOST_BYTES)
        note("masters", *group.masters)
    for held in engine.partition.gradients:
        note("gradients", *(held.owned(bucket) for bucket in held.group.layout.buckets))
    training.engine_step(engine, 0)
    note("parameters", *model.parameters(), *model.buffers())
    note("pieces", *(getattr(param, "ds_tensor", None) for param in model.parameters()))
    for state in engine.optimizer.state.values():
        note("states", *(value for value in state.values() if torch.is_tensor(value) and value.ndim))
    with xtrain.zero.GatheredParameters(list(model.parameters())):
        note("whole", *model.parameters())
    engine.destroy()
    return found


@pytest.mark.parametrize("communication", [None, "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_everything_an_engine_holds_is_aligned(
    ranks: Any, tmp_path: Path, stage: int, communication: str | None
) -> None:
    for found in ranks(2, _engine_addresses, stage, communication, str(tmp_path)):
        assert {what for what, addresses in found.items() if addresses - {0}} == set()
        assert {"slices", "masters", "gradients", "gathered", "whole", "states", "sent"} <= found.keys()


def _built_divided() -> set[int]:
    with xtrain.zero.Init():
        model = toys.MixedDtypes()
    with xtrain.zero.GatheredParameters(list(model.parameters())):
        addresses = {_address(param) for param in model.parameters()}
    return addresses | {_address(param.ds_tensor) for param in model.parameters() if param.ds_tensor.numel()}


def test_parameters_of_zero_init_are_aligned(ranks: Any) -> None:
    assert ranks(3, _built_divided) == [{0}] * 3


def test_mapped_files_are_aligned(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path)
    assert {_address(memory.allocate(n, dtype)) for n in (1, 33) for dtype in DTYPES} == {0}


def _shared_memory() -> set[int]:
    from xtrain.comm.shm import arena

    return {_address(arena.own().zeros(n, dtype)) for n in (1, 33, 5000) for dtype in DTYPES}


def test_shared_memory_is_aligned(ranks: Any) -> None:
    assert ranks(1, _shared_memory) == [{0}]


# ---------------------------------------------------------------- models whose weights are views of a file


def _train_in_views(stage: int, file: str) -> tuple[list[float], bool, set[int]]:
    torch.manual_seed(1)
    model = toys.FrozenBase()
    if file:
        # One block in which everything lies at odd places, as tensors of a mapped checkpoint do.
        model.load_state_dict(load_file(file), assign=True)
        block = torch.zeros(10_000)
        place = 1
        for tensor in [*model.parameters(), *model.buffers()]:
            view = block[place : place + tensor.numel()].view(tensor.shape)
            tensor.data = view.copy_(tensor)
            place += tensor.numel() + 1
    odd = any(not is_aligned(tensor) for tensor in model.parameters())
    engine = xtrain.initialize(model=model, config=training.config(stage, micro=8, xtrain={"aligned": True}))[
        0
    ]
    losses = [training.engine_step(engine, step).hex() for step in range(4)]
    return losses, odd, {_address(t) for t in [*model.parameters(), *model.buffers()] if t.numel()}


@pytest.mark.bits
def test_frozen_weights_in_views_of_a_file_give_the_bits_of_other_memory(ranks: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = toys.FrozenBase()
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "weights.safetensors",
    )
    expected, odd, _ = ranks(2, _train_in_views, 0, "")[0]
    assert not odd
    for stage in (0, 1, 2, 3):
        losses, odd, addresses = ranks(2, _train_in_views, stage, str(tmp_path / "weights.safetensors"))[0]
        assert odd  # the case is one
        assert losses == expected
        assert addresses == {0}


def _shared_buffers() -> bool:
    """Two buffers that are views of each other stay so: a model may write through one and read the other."""
    model = training.build_model()
    whole = torch.arange(20.0)
    model.register_buffer("whole", whole)
    model.register_buffer("rest", whole[3:])
    engine = xtrain.initialize(model=model, config=training.config(1, micro=8))[0]
    engine.module.whole[5] = 77.0
    return bool(engine.module.rest[2] == 77.0)


def test_buffers_that_share_memory_keep_sharing_it(ranks: Any) -> None:
    assert ranks(2, _shared_buffers) == [True, True]
