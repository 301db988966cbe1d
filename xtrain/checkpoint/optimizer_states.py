"""Which of an optimizer's states are cut into runs of elements, and which are stored as they are.

A state with one value for each element of every master can be cut for any number of ranks and any stage. What is
left are step counts, the same for all parameters, and in stage 0 whatever an optimizer keeps of a whole parameter
(Adafactor's factored moments): those are stored by parameter, and load into stage 0 only.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from xtrain.base.errors import CheckpointError
from xtrain.base.log import log_dist
from xtrain.checkpoint import contents
from xtrain.zero.flat import FlatGroup


def _is_elementwise(value: Any, master: torch.Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == master.shape


def kinds(group: FlatGroup, optimizer: torch.optim.Optimizer) -> list[str]:
    """Kinds of state that are cut: the master weight, and what every master has one value an element of."""
    states = [optimizer.state.get(master, {}) for master in group.masters]
    every = [
        kind
        for kind in states[0]
        if all(
            _is_elementwise(state.get(kind), master)
            for state, master in zip(states, group.masters, strict=True)
        )
    ]
    return [contents.MASTER, *every]


def shards(group: FlatGroup, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """This rank's part of each of `kinds`, in shard order."""
    found = {contents.MASTER: group.assemble([master.data for master in group.masters])}
    for kind in kinds(group, optimizer)[1:]:
        found[kind] = group.assemble([optimizer.state[master][kind] for master in group.masters])
    return found


def others(group: FlatGroup, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The rest by the name of the parameter; of the first master alone where slices stand for parameters."""
    cut = set(kinds(group, optimizer))
    result = {}
    for name, master in zip(
        group.names, group.masters if group.by_parameter else group.masters[:1], strict=False
    ):
        state = optimizer.state.get(master, {})
        rest = {kind: value for kind, value in state.items() if kind not in cut}
        if not group.by_parameter and (lost := [kind for kind, value in rest.items() if _is_large(value)]):
            log_dist(
                f"the checkpoint lacks {', '.join(lost)} of {type(optimizer).__name__}, which are neither one value an "
                "element nor one number, so that no other run could take them over: use ZeRO stage 0 to save them",
                ranks=[0],
                level=logging.WARNING,
            )
            rest = {kind: value for kind, value in rest.items() if kind not in lost}
            rest[contents.LOST] = lost
        result[name] = {
            kind: value.cpu() if torch.is_tensor(value) else value for kind, value in rest.items()
        }
    return result


def _is_large(value: Any) -> bool:
    return torch.is_tensor(value) and value.numel() > 1


def others_of_masters(
    group: FlatGroup, saved: dict[str, dict[str, Any]], directory: Path
) -> list[dict[str, Any]]:
    """What `others` has saved, for each of the group's masters.

    Raises:
        CheckpointError: it is of whole parameters, and this run keeps slices; or it was not saved.
    """
    default = next((saved[name] for name in group.names if name in saved), next(iter(saved.values()), {}))
    found = [saved.get(name, default) for name in group.names]
    for name, rest in zip(group.names, found, strict=True):
        if lost := rest.get(contents.LOST):
            raise CheckpointError(
                f"checkpoint {directory} lacks the optimizer's {', '.join(lost)}, which could not be saved above ZeRO "
                "stage 0: pass load_optimizer_states=False"
            )
        if not group.by_parameter and (large := [kind for kind, value in rest.items() if _is_large(value)]):
            raise CheckpointError(
                f"checkpoint {directory} has the optimizer's {large[0]!r} of the whole parameter {name!r}, and slices "
                "cannot be cut of it: load it in ZeRO stage 0, or pass load_optimizer_states=False"
            )
    return found if group.by_parameter else [default] * len(group.masters)
