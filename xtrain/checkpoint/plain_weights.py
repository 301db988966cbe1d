"""Plain weights, for other programs: one `torch.save` file of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtrain import comm
from xtrain.base.errors import CheckpointError, NotImplementedYetError
from xtrain.base.files import atomic_path
from xtrain.base.log import log_dist
from xtrain.comm.rank_agreement import together
from xtrain.zero.buffers import is_dense
from xtrain.zero.train_state import TrainState
from xtrain.zero.weights import whole_state_dict


def standalone(state: dict[str, Any]) -> dict[str, Any]:
    """Copies on the host, so that no flat buffer is written with them; tied tensors stay tied."""
    copies: dict[Any, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        if not is_dense(value):
            return value.detach().to("cpu", copy=True)
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies or not value.numel():
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return {name: copied(value) for name, value in state.items()}


def consolidated(module: nn.Module, exclude_frozen: bool) -> dict[str, Any] | None:
    """The whole weights on rank 0, None elsewhere; every rank must call it."""
    first = comm.get_rank() == 0
    state = whole_state_dict(module, keep=first, exclude_frozen=exclude_frozen)
    return state if first else None


def save_16bit(state: TrainState, path: Path, exclude_frozen: bool) -> bool:
    """See XtrainEngine.save_16bit_model."""
    if state.grid.model.size > 1:
        raise NotImplementedYetError(
            "save_16bit_model() of a model whose parts are on several ranks",
            "use save_checkpoint(), or write engine.module_state_dict() on each",
        )
    if state.stage == 3 and not state.values.zero_optimization.gather_16bit_weights_on_model_save:
        log_dist(
            f"{path} was not written: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true",
            ranks=[0],
        )
        return False
    weights = consolidated(state.module, exclude_frozen)

    def write() -> None:
        if weights is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                torch.save(standalone(weights), temporary)

    together(write, f"writing {path}", CheckpointError)
    return True
