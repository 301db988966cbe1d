"""Weights in a file of DeepSpeed's name and layout, `TAG/mp_rank_00_model_states.pt`, for scripts that read it.

It has no optimizer states: what continues a run is `save_checkpoint`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from xtrain.base.errors import CheckpointError
from xtrain.base.files import atomic_path
from xtrain.base.missing import API_VERSION
from xtrain.checkpoint.plain_weights import standalone
from xtrain.zero.train_state import TrainState
from xtrain.zero.weights import whole_state_dict


def file_of(state: TrainState, folder: Path) -> Path:
    """The file of this rank's part of the model."""
    return folder / f"mp_rank_{state.grid.model.rank:02d}_model_states.pt"


def make_folder(folder: Path) -> None:
    """Make a checkpoint's folder; a rank may call it alone.

    Raises:
        CheckpointError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be made: {error}") from None


def save(state: TrainState, folder: Path, client_state: dict[str, Any], exclude_frozen: bool) -> None:
    """Write the weights of each part of the model, whole in every stage, beside the script's own state.

    Below stage 3 the first rank of a part may call it alone, as in DeepSpeed; in stage 3 every rank must.

    Raises:
        CheckpointError: the file cannot be written.
    """
    writes = state.grid.rank == 0
    weights = whole_state_dict(state.module, keep=writes, exclude_frozen=exclude_frozen)
    if not writes:
        return
    counters = state.counters
    contents = {
        "module": standalone(weights),
        "ds_version": API_VERSION,
        "global_steps": counters.global_steps,
        "global_samples": counters.global_samples,
        "skipped_steps": counters.skipped_steps,
        "dp_world_size": state.grid.size,
        "mp_world_size": state.grid.model.size,
        **client_state,
    }
    make_folder(folder)
    path = file_of(state, folder)
    try:
        with atomic_path(path) as temporary:
            torch.save(contents, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        raise CheckpointError(f"{path} cannot be written: {error}") from None
