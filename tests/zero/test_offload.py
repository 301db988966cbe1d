"""States on disk: the same bits as in memory, nothing left behind, and errors for what cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests import toys, training
from tests.zero.test_stage3 import engine_of, ids_of
from xtrain.base.errors import ConfigError
from xtrain.zero.flat import FlatGroup, FlatOptions
from xtrain.zero.gradients import WholeGradients
from xtrain.zero.offload import DiskMemory


def _disk(folder: str) -> dict[str, Any]:
    return {"device": "nvme", "nvme_path": folder}


def _train(folder: str, stage: int, what: tuple[str, ...], bf16: bool, kind: str) -> list[float]:
    model = toys.LanguageModel("tied")
    optimizer = {"type": kind, "params": {"lr": 0.01}}
    offload = {f"offload_{name}": _disk(folder) for name in what}
    engine = engine_of(model, stage, bf16={"enabled": bf16}, optimizer=optimizer, zero=offload)
    losses = []
    for step in range(4):
        loss = engine(ids_of(engine.global_rank, step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    memory = engine.partition.state_memory
    if "optimizer" in what:
        assert isinstance(memory, DiskMemory)
        for group in engine.optimizer.groups:
            for master in group.masters:
                states = [v for v in engine.optimizer.state[master].values() if torch.is_tensor(v) and v.ndim]
                assert states
                assert all(memory.holds(tensor) for tensor in (master, *states))
    assert os.listdir(folder) == []  # unlinked as soon as they are mapped
    return losses


@pytest.mark.bits
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("stage", "what"),
    [(1, ("optimizer",)), (2, ("optimizer",)), (3, ("optimizer", "param")), (3, ("param",))],
)
@pytest.mark.parametrize("kind", ["AdamW", "RMSprop"])
def test_states_on_disk_give_the_same_bits(
    ranks: Any, tmp_path: Path, stage: int, what: tuple[str, ...], bf16: bool, kind: str
) -> None:
    for world in (1, 2):
        expected = ranks(world, _train, str(tmp_path), stage, (), bf16, kind)
        assert ranks(world, _train, str(tmp_path), stage, what, bf16, kind) == expected


def _storages(engine: Any) -> dict[str, set[int]]:
    def of(tensors: Any) -> set[int]:
        return {t.untyped_storage().data_ptr() for t in tensors if torch.is_tensor(t) and t.ndim}

    return {
        "optim_states": of(v for state in engine.optimizer.state.values() for v in state.values()),
        "hp_params": of(m for group in engine.optimizer.groups for m in group.own_masters()),
        "lp_params": of(getattr(g, "shard", getattr(g, "params", None)) for g in engine.optimizer.groups),
        "lp_grads": of(getattr(i, "shard", getattr(i, "buffer", None)) for i in engine.partition.gradients),
    }


def _move(folder: str, stage: int, include: list[str] | None) -> list[float]:
    engine = engine_of(
        toys.LanguageModel("tied"), stage, bf16={"enabled": True}, zero={"offload_optimizer": _disk(folder)}
    )
    losses = []
    for step in range(4):
        loss = engine(ids_of(engine.global_rank, step))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if step == 1:
            before = _storages(engine)
            engine.offload_states(include, device="nvme")
            away = _storages(engine)
            for kind, storages in away.items():
                kept = kind in ("optim_states", "hp_params")  # they are on the disk already
                assert storages.isdisjoint(before[kind]) == (
                    (include is None or kind in include) and not kept
                )
            with pytest.raises(ConfigError, match="twice"):
                engine.offload_states(include, device="nvme")
            engine.reload_states()
            if include is None:
                assert _storages(engine)["lp_params"].isdisjoint(away["lp_params"])
    return losses


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("include", [None, ["lp_params"], ["lp_grads", "optim_states"]])
def test_offload_states_and_reload_states(
    ranks: Any, tmp_path: Path, stage: int, include: list[str] | None
) -> None:
    expected = ranks(2, _train, str(tmp_path), stage, (), True, "AdamW")
    assert ranks(2, _move, str(tmp_path), stage, include) == expected


def _mistakes(folder: str) -> list[str]:
    said = []
    file = Path(folder) / f"file{xtrain.comm.get_rank()}"
    file.touch()
    for offload in ({"device": "nvme"}, _disk(str(file))):
        with pytest.raises(ConfigError) as caught:
            engine_of(toys.LanguageModel(), 1, zero={"offload_optimizer": offload})
        said.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        engine_of(toys.LanguageModel(), 0, zero={"offload_optimizer": _disk(folder)})
    said.append(str(caught.value))
    engine = engine_of(toys.LanguageModel(), 1)
    for arguments in ({"include": ["weights"]}, {"device": "nvme"}, {"device": "tape"}):
        with pytest.raises(ConfigError) as caught:
            engine.offload_states(**arguments)
        said.append(str(caught.value))
    engine.offload_states()
    engine.backward(engine(ids_of(0, 0)))
    with pytest.raises(ConfigError) as caught:
        engine.step()
    said.append(str(caught.value))
    return said


def test_mistakes_are_one_sentence(ranks: Any, tmp_path: Path) -> None:
    said = ranks(1, _mistakes, str(tmp_path))[0]
    expected = (
        "nvme_path",
        "could not be reserved",
        "needs ZeRO stage 1",
        "weights",
        "nvme_path",
        "tape",
        "reload",
    )
    for sentence, word in zip(said, expected, strict=True):
        assert word in sentence
        assert "\n" not in sentence


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left"):
        DiskMemory(tmp_path).allocate(10, torch.float32)
    assert os.listdir(tmp_path) == []


def test_the_old_spelling_and_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    from xtrain.config import load_config

    zero = load_config(training.config(1, zero_optimization={"stage": 1, "cpu_offload": True}))
    assert zero.values.zero_optimization.offload_optimizer.device == "cpu"


def test_gradients_on_another_device_are_shown_again_when_they_are_back() -> None:
    """torch refuses a gradient on another device than its parameter; "meta" stands for that device here."""
    params = [("weight", torch.nn.Parameter(torch.ones(4, 3))), ("bias", torch.nn.Parameter(torch.ones(3)))]
    held = WholeGradients(FlatGroup(params, 0, FlatOptions(1, 0, 100, 4)), torch.float32, None)
    params[1][1].grad = None
    held.move(lambda tensor: tensor.to("meta"))
    assert [param.grad for _, param in params] == [None, None]
    held.move(lambda tensor: torch.full(tensor.shape, 2.0))
    weight, bias = (param.grad for _, param in params)
    assert weight is not None
    assert weight.data_ptr() == held.view(0).data_ptr()
    assert bias is None
    held.move(lambda tensor: tensor.to("meta"))
    held.zero()
    held.move(lambda tensor: torch.zeros(tensor.shape))
    assert all(param.grad is not None for _, param in params)
