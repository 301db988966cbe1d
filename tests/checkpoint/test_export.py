"""Whole float32 weights out of a checkpoint, compared with the masters they were written from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import xtrain
from tests import toys
from xtrain.base.errors import CheckpointError, ConfigError, NotImplementedYetError
from xtrain.checkpoint.export import _bytes, _shards
from xtrain.utils import safe_get_full_fp32_param
from xtrain.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
    main,
)


def _save(folder: str, stage: int, half: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": half},
        "data_types": {"buffer_dtype": "bf16"} if half else {},
        "optimizer": {"type": "Adam", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 4},
    }
    engine, *_ = xtrain.initialize(model=toys.FrozenNormTied(), config=config)
    dtype = torch.bfloat16 if half else torch.float32
    for _ in range(2):
        engine.backward(engine(torch.randn(4, 3, dtype=dtype)).float().square().sum())
        engine.step()
    engine.save_checkpoint(folder)
    masters = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    whole = {name: value.detach().clone() for name, value in engine.module_state_dict().items()}
    return {**whole, **{name: value.clone() for name, value in masters.items() if value is not None}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("half", [False, True])
def test_the_masters_come_out(
    ranks: Callable[..., list[Any]], tmp_path: Path, stage: int, half: bool
) -> None:
    expected = ranks(2, _save, str(tmp_path), stage, half)[0]
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    expected["tied.weight"] = expected["out.weight"]  # masters are listed under the first name
    assert state.keys() == expected.keys()
    assert state["tied.weight"] is state["out.weight"]  # one tensor under both names, as in DeepSpeed
    for name, value in state.items():
        assert value.dtype == (torch.int64 if name == "norm.num_batches_tracked" else torch.float32)
        assert torch.equal(value, expected[name].to(value.dtype)), name
    trained = get_fp32_state_dict_from_zero_checkpoint(
        tmp_path, "global_step2", exclude_frozen_parameters=True
    )
    assert set(state) - set(trained) == {"frozen.weight", "frozen.bias"}

    model = load_state_dict_from_zero_checkpoint(toys.FrozenNormTied(), tmp_path)
    assert torch.equal(model.tied.weight, expected["out.weight"].float())
    assert torch.equal(model.norm.running_mean, expected["norm.running_mean"].float())


def test_files_for_other_programs(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(1, _save, str(tmp_path / "run"), 1, True)
    state = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "run")
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "run", tmp_path / "one")
    one = torch.load(tmp_path / "one" / "pytorch_model.bin", weights_only=True)
    convert_zero_checkpoint_to_fp32_state_dict(
        tmp_path / "run", tmp_path / "many", 50, safe_serialization=True
    )
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    many = {name: load_file(tmp_path / "many" / file)[name] for name, file in index["weight_map"].items()}
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    for found in (one, many):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_program(
    ranks: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    ranks(2, _save, str(run), 2, True)
    state = get_fp32_state_dict_from_zero_checkpoint(run)
    assert main([str(run), str(out)]) == 0
    assert f"{out / 'pytorch_model.bin'}: 9 tensors, 43 elements" in capsys.readouterr().out
    found = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert found.keys() == state.keys()
    assert found["tied.weight"].data_ptr() == found["out.weight"].data_ptr()
    assert main([str(run), str(out), "--safe_serialization", "-t", "global_step2", "-d"]) == 0
    assert "  tied.weight (3, 3) float32" in capsys.readouterr().out
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert main([str(run), str(out / "small"), "--max_shard_size", "50", "--exclude_frozen_parameters"]) == 0
    index = json.loads((out / "small" / "pytorch_model.bin.index.json").read_text())
    assert state.keys() - index["weight_map"].keys() == {"frozen.weight", "frozen.bias"}

    # The usual recipe: cd there, and run the script that lies beside the checkpoints.
    recipe = [sys.executable, "zero_to_fp32.py", ".", str(out / "recipe")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(recipe, cwd=run, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert torch.load(out / "recipe" / "pytorch_model.bin", weights_only=True).keys() == state.keys()
    assert os.access(run / "zero_to_fp32.py", os.X_OK)


def _resealed(directory: Path, name: str) -> None:
    """Let the manifest's checksum fit a file that was changed."""
    manifest = json.loads((directory / "manifest.json").read_text())
    content = (directory / name).read_bytes()
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_what_the_program_cannot_do_is_one_sentence(
    ranks: Callable[..., list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(2, _save, str(tmp_path), 2, True)
    weights = tmp_path / "global_step2" / "model.safetensors"

    def said(*arguments: str) -> str:
        assert main([str(tmp_path), str(tmp_path / "out"), *arguments]) == 2
        text = capsys.readouterr().err
        assert text.startswith("zero_to_fp32: error: ")
        assert text.count("\n") == 1
        return text

    assert "step9 is not a complete checkpoint" in said("--tag", "step9")
    assert "'5 apples'" in said("--max_shard_size", "5 apples")
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert "does not match its checksum" in said()
    _resealed(weights.parent, weights.name)
    assert "model.safetensors cannot be read" in said()
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert "latest cannot be read" in said()
    with pytest.raises(CheckpointError):
        main([str(tmp_path), str(tmp_path / "out"), "--debug"])


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, "step9")
    with pytest.raises(NotImplementedYetError, match="lazy_mode"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path, lazy_mode=True)
    with pytest.raises(ConfigError, match="5 apples"):
        convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path, "5 apples")


def test_sizes_and_shards() -> None:
    assert [_bytes(size) for size in ("5GB", "10 kb", 7)] == [5 * 10**9, 10**4, 7]
    state = {name: torch.zeros(size) for name, size in (("a", 2), ("b", 100), ("c", 1), ("d", 1))}
    assert [list(shard) for shard in _shards(state, 8)] == [["a"], ["b"], ["c", "d"]]
    assert [list(shard) for shard in _shards(state, None)] == [["a", "b", "c", "d"]]
