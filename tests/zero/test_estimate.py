"""The estimates against a real engine's live tensors, DeepSpeed's signatures, and by hand."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import xtrain
from xtrain import zero
from xtrain.zero.estimate import count_params, model_state_bytes

NAMES = [
    f"estimate_zero{stage}_model_states_mem_needs{suffix}"
    for stage in (2, 3)
    for suffix in ("", "_all_live", "_all_cold")
]


def _live(stage: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients, masters and optimizer states after a step, in bf16; Psi; N."""
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Adam"},
    }
    engine, *_ = xtrain.initialize(model=model, config=settings)
    engine.backward(engine(torch.ones(1, 256, dtype=torch.bfloat16)).float().square().mean())
    engine.step()
    held = [*engine.optimizer.gradients, *engine.optimizer.groups]
    tensors = [value for item in held for value in vars(item).values()]
    tensors += [*model.parameters(), *(master for g in engine.optimizer.groups for master in g.masters)]
    tensors += [value for state in engine.optimizer.state.values() for value in state.values()]
    storages = {}
    for tensor in tensors:
        if torch.is_tensor(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()), count_params(model)[0], engine.world_size


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks_", [1, 2, 4])
def test_against_live_tensors(ranks: Any, ranks_: int, stage: int) -> None:
    for used, params, n in ranks(ranks_, _live, stage):
        assert model_state_bytes(params, stage, n) == pytest.approx(used, rel=0.01)
        if stage == 2:
            _, device = zero.estimate_zero2_model_states_mem_needs(params, n, cpu_offload=False)
            assert device == pytest.approx(used, rel=0.01)
        if stage == 3:
            _, device, groups = zero.estimate_zero3_model_states_mem_needs(
                params, params // 2, n, 1, False, False
            )
            assert device - groups == pytest.approx(used, rel=0.01)


def test_by_hand() -> None:
    psi, layer = 1_000_000, 10_000
    # 8 devices on 2 nodes of 4: 2 + 14/8 bytes; the float32 model of four processes on the host.
    assert zero.estimate_zero2_model_states_mem_needs(psi, 4, 2, False, 1.0) == (16 * psi, 3_750_000)
    # 12/8 bytes leave each device; the host's peak stays the building of the model.
    assert zero.estimate_zero2_model_states_mem_needs(psi, 4, 2, True, 1.0) == (16 * psi, 2_250_000)
    assert zero.estimate_zero2_model_states_mem_needs(psi, 1, 1, True, 1.5) == (18 * psi, 4 * psi)
    three = zero.estimate_zero3_model_states_mem_needs
    assert three(psi, layer, 4, 2, False, False, True, 1.0) == (16 * layer, 2 * psi + 4 * layer, 4 * layer)
    assert three(psi, layer, 4, 2, True, False, True, 1.0) == (6 * psi, 500_000 + 4 * layer, 4 * layer)
    assert three(psi, layer, 4, 2, True, True, True, 1.0) == (7 * psi, 250_000 + 4 * layer, 4 * layer)
    assert three(psi, layer, 4, 2, True, True, False, 1.0) == (16 * psi, 250_000 + 4 * layer, 4 * layer)


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000))
    model[1].weight = model[0].weight
    assert count_params(model) == (1_002_000, 1_001_000)
    zero.estimate_zero2_model_states_mem_needs_all_live(model, num_gpus_per_node=8, num_nodes=2)
    two = capsys.readouterr().out.splitlines()
    assert two[1] == "HW: Setup with 2 nodes, 8 GPUs per node."
    assert two[2] == "SW: Model with 1M total params."
    assert [line.split("|")[2].strip() for line in two[4:]] == [
        "offload_optimizer=cpu",
        "offload_optimizer=none",
    ]
    zero.estimate_zero3_model_states_mem_needs_all_cold(3 * 10**9, 10**8, 8)
    three = capsys.readouterr().out.splitlines()
    assert len(three) == 4 + 6
    last = zero.estimate_zero3_model_states_mem_needs(3 * 10**9, 10**8, 8, 1, False, False, False)
    assert f"{last[0] / 2**30:.2f}GB" in three[-1]
    assert f"{last[1] / 2**30:.2f}GB" in three[-1]


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from xtrain.zero import estimate_zero3_model_states_mem_needs_all_cold as f; "
        "f(10**9, 10**8, 8); assert 'torch' not in sys.modules"
    )
    root = Path(__file__).resolve().parents[2]
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
    )


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_deepspeeds(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = "stage3" if "zero3" in name else "stage_1_and_2"
    theirs = pytest.importorskip(f"deepspeed.runtime.zero.{path}", reason="needs the extra deepspeed")
    ours = pytest.importorskip(f"xtrain.runtime.zero.{path}")

    def signature(module: Any) -> list[tuple[str, Any]]:
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        return [(parameter.name, parameter.default) for parameter in parameters]

    assert signature(ours) == signature(theirs)
    assert getattr(ours, name) is getattr(zero, name)
