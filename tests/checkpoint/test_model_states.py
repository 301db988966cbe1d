"""`engine._save_checkpoint`: a file of DeepSpeed's name that any script can read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xtrain
from tests.toys import TwoLayers
from xtrain.base.errors import CheckpointError


def _save(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = TwoLayers()
    engine, *_ = xtrain.initialize(
        model=model,
        config={"train_batch_size": 2, "zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW"}},
    )
    expected = {name: value.clone() for name, value in engine.module_state_dict().items()}
    assert engine._create_checkpoint_file(str(folder), "7", False)
    assert (folder / "7").is_dir()
    if stage == 3 or torch.distributed.get_rank() == 0:  # below stage 3 scripts let the first rank do it
        engine._save_checkpoint(str(folder), "7", client_state={"iteration": 7})
    torch.distributed.barrier()
    assert engine._get_ckpt_name(str(folder), "7") == str(folder / "7" / "mp_rank_00_model_states.pt")
    assert engine._get_ckpt_name(str(folder), "7", "*").endswith("/7/mp_rank_*_model_states.pt")
    return expected


@pytest.mark.parametrize("stage", [0, 3])
def test_weights_and_the_scripts_own_state(
    ranks: Callable[..., list[Any]], tmp_path: Path, stage: int
) -> None:
    expected = ranks(2, _save, tmp_path, stage)[0]
    assert [path.name for path in (tmp_path / "7").iterdir()] == ["mp_rank_00_model_states.pt"]
    found = torch.load(tmp_path / "7" / "mp_rank_00_model_states.pt", weights_only=True)
    assert (found["iteration"], found["dp_world_size"], found["global_steps"]) == (7, 2, 0)
    assert found["module"].keys() == expected.keys()
    assert all(found["module"][name].equal(value) for name, value in expected.items())


def _cannot(folder: Path) -> None:
    engine, *_ = xtrain.initialize(
        model=TwoLayers(), config={"train_batch_size": 2, "optimizer": {"type": "AdamW"}}
    )
    with pytest.raises(CheckpointError, match="cannot be made"):
        engine._create_checkpoint_file(str(folder / "file"), "7", False)


def test_a_folder_that_cannot_be_made(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ranks(2, _cannot, tmp_path)
