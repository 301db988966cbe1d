"""Buffers of every kind: the first rank's on every rank, trained with, saved, loaded and exported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import toys, training
from xtrain.base.errors import CheckpointError
from xtrain.base.log import logger
from xtrain.checkpoint.export import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
)
from xtrain.engine.build import place_module
from xtrain.zero.buffers import SPARSE

LAYOUTS = {
    "coo": lambda dense: dense.to_sparse(),
    "coo, not coalesced": lambda dense: torch.sparse_coo_tensor(
        dense.nonzero().t().repeat(1, 2), dense[dense != 0].repeat(2) / 2, dense.shape
    ),
    "csr": lambda dense: dense.to_sparse_csr(),
    "csc": lambda dense: dense.to_sparse_csc(),
    "bsr": lambda dense: dense.to_sparse_bsr((2, 2)),
    "bsc": lambda dense: dense.to_sparse_bsc((2, 2)),
}


def _graph(seed: int) -> torch.Tensor:
    """Another number of edges for each seed."""
    generator = torch.Generator().manual_seed(seed)
    edges = torch.rand(toys.FEATURES + 1, toys.FEATURES + 1, generator=generator)
    return edges * (edges > 0.3 + 0.2 * seed)


def _model(layout: str, seed: int) -> toys.Graph:
    return toys.Graph(LAYOUTS[layout](_graph(seed)))


def _engine(layout: str, stage: int, seed: int) -> Any:
    torch.manual_seed(0)
    config = training.config(
        stage, micro=8, optimizer={"type": "SGD", "params": {"lr": 0.1}}, gradient_clipping=0.0
    )
    del config["scheduler"]
    return xtrain.initialize(model=_model(layout, seed), config=config)[0]


def _sparse(layout: str, stage: int, folder: str) -> dict[str, Any]:
    rank = xtrain.comm.get_rank()
    engine = _engine(layout, stage, rank)  # ranks have different graphs
    before = engine.module.adjacency
    losses = [training.engine_step(engine, step) for step in range(3)]
    engine.save_checkpoint(folder, "one")
    engine.save_16bit_model(folder)
    state = engine.module_state_dict()
    other = _engine(layout, stage, 2)  # and here it is another one altogether
    shared = other.module.adjacency is other.module.again.same
    other.load_checkpoint(folder, "one")
    losses.append(training.engine_step(other, 3))
    third = _engine(layout, stage, 2)
    third.load_module_state_dict(state)
    return {
        "losses": losses,
        "graph": before.to_dense(),
        "loaded": other.module.adjacency.to_dense(),
        "from state": third.module.adjacency.to_dense(),
        "layout": before.layout,
        "coalesced": before.layout == torch.sparse_coo and before.is_coalesced(),
        "shared": shared,
        "state": state["adjacency"].to_dense(),
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_buffers(ranks: Any, tmp_path: Path, layout: str, stage: int) -> None:
    expected = _graph(0)
    torch.manual_seed(0)
    model = toys.Graph(_graph(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(4):
        loss = training.loss_of(model, *training.samples(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for found in ranks(2, _sparse, layout, stage, str(tmp_path)):
        for what in ("graph", "loaded", "from state", "state"):
            assert torch.equal(found[what], expected), what
        assert found["layout"] in SPARSE
        assert found["coalesced"] == (layout == "coo")
        assert found["shared"]
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
    exported = get_fp32_state_dict_from_zero_checkpoint(tmp_path, "one")
    assert torch.equal(exported["adjacency"].to_dense(), expected)
    assert exported["lin.weight"].shape == (toys.OUTPUTS, toys.FEATURES)
    if stage < 3:
        plain = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        assert torch.equal(plain["adjacency"].to_dense(), expected)
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out", max_shard_size=100, tag="one")
        assert len(list((tmp_path / "out").glob("*.bin"))) > 1
        with pytest.raises(
            CheckpointError, match=r"'adjacency' is torch\.sparse.*safetensors files cannot hold"
        ):
            convert_zero_checkpoint_to_fp32_state_dict(
                tmp_path, tmp_path / "out", tag="one", safe_serialization=True
            )


def _in_bf16() -> list[Any]:
    """Buffers in the model's dtype: a matrix whose dtype changes must not keep its old one, or lose its values."""
    found = []
    for layout in LAYOUTS:
        model = _model(layout, 0)
        model.lin.to(torch.bfloat16)
        model.adjacency = model.again.same = LAYOUTS[layout](_graph(0).double())
        config = {**training.config(1, micro=8, bf16=True), "bf16": {"enabled": True}}
        engine = xtrain.initialize(model=model, config=config)[0]
        place_module(model, engine.device, torch.bfloat16, engine.backend, torch.bfloat16)
        found.append((model.adjacency.dtype, model.adjacency.to_dense().float()))
    return found


def test_sparse_buffers_take_another_dtype(ranks: Any) -> None:
    for dtype, dense in ranks(1, _in_bf16)[0]:
        assert dtype == torch.bfloat16
        assert torch.equal(dense, _graph(0).double().bfloat16().float())


def _odd(stage: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = xtrain.initialize(
        model=toys.WithBuffers(xtrain.comm.get_rank()), config=training.config(stage, micro=8)
    )[0]
    training.engine_step(engine, 0)
    engine.save_checkpoint(folder, "one")
    other = xtrain.initialize(model=toys.WithBuffers(7), config=training.config(stage, micro=8))[0]
    other.load_checkpoint(folder, "one")
    assert other.module.tied is other.module.whole
    buffers = {name: b.resolve_conj().clone() for name, b in engine.module.named_buffers()}
    loaded = {name: b.resolve_conj().clone() for name, b in other.module.named_buffers()}
    for name in (
        "passing",
        "repeated",
    ):  # not in checkpoints; torch itself loads nothing into an expanded tensor
        del loaded[name]
    return {"buffers": buffers, "loaded": loaded}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_dense_buffers_of_every_kind(ranks: Any, tmp_path: Path, stage: int) -> None:
    expected = dict(toys.WithBuffers(0).named_buffers())
    for found in ranks(2, _odd, stage, str(tmp_path)):
        for kind in ("buffers", "loaded"):
            for name, value in found[kind].items():
                assert value.dtype == expected[name].dtype, name
                assert torch.equal(_comparable(value), _comparable(expected[name])), (kind, name)
        assert "passing" in found["buffers"]
    exported = get_fp32_state_dict_from_zero_checkpoint(tmp_path, "one")
    assert torch.equal(exported["complex128"], expected["complex128"])


def _comparable(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype == torch.float8_e4m3fn else value.resolve_conj()


def _own_shapes(stage: int) -> tuple[list[float], list[float], str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    model, rank = training.build_model(), xtrain.comm.get_rank()
    model.register_buffer("cache", torch.full((rank + 2,), float(rank)))
    model.register_buffer("mean", torch.full((2,), float(rank)))
    try:
        engine = xtrain.initialize(model=model, config=training.config(stage, micro=8))[0]
    finally:
        logger.removeHandler(handler)
    training.engine_step(engine, 0)
    return model.cache.tolist(), model.mean.tolist(), "\n".join(said)


def test_buffers_whose_shape_depends_on_the_rank_are_left_alone(ranks: Any) -> None:
    """As in DeepSpeed, which broadcasts no buffers at all."""
    first, second = ranks(2, _own_shapes, 1)
    assert first[:2] == ([0.0, 0.0], [0.0, 0.0])
    assert second[:2] == ([1.0, 1.0, 1.0], [0.0, 0.0])
    assert (
        "buffers that differ between ranks in shape, dtype or layout keep each rank's own values: cache"
        in first[2]
    )
