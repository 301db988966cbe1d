"""The model's weights by name, when its parameters may be divided (ZeRO stage 3)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from xtrain.base.errors import CheckpointError
from xtrain.comm.rank_agreement import together
from xtrain.zero import names
from xtrain.zero.buffers import make_room
from xtrain.zero.gather import ShardedHome
from xtrain.zero.gathered import GatheredParameters
from xtrain.zero.home import home_of


def sharded_parameters(module: nn.Module) -> dict[str, ShardedHome]:
    """Homes of the divided parameters by name; a tied one stands under each of its names."""
    found = {}
    for name, param in names.parameters(module, remove_duplicate=False):
        if isinstance(home := home_of(param), ShardedHome):
            found[name] = home
    return found


@torch.no_grad()
def whole_state_dict(
    module: nn.Module, keep: bool = True, exclude_frozen: bool = False, keep_vars: bool = False
) -> dict[str, Any]:
    """`module.state_dict()` with divided parameters whole, in host memory. Collective in stage 3.

    Args:
        keep: False only takes part in the gathering: the dictionary lacks divided parameters.
        exclude_frozen: leave parameters without gradient out.
        keep_vars: do not detach what is not divided.
    """
    sharded = sharded_parameters(module)
    every = names.state_dict(module, keep_vars)
    state = {name: value for name, value in every.items() if name not in sharded}
    by_group: dict[Any, list[str]] = {}
    for name, home in sharded.items():
        by_group.setdefault(home.param_group, []).append(name)
    copies: dict[nn.Parameter, torch.Tensor] = {}
    for param_group, held in by_group.items():
        home = sharded[held[0]]
        home.gatherer.unshard(param_group)
        for name in held if keep else ():
            param = sharded[name].group.members[sharded[name].member]
            if param not in copies:
                copies[param] = param.detach().cpu().clone()
            state[name] = copies[param]
        home.gatherer.reshard(param_group)
    frozen: set[str] = set()
    if exclude_frozen:
        named = names.parameters(module, remove_duplicate=False)
        frozen = {name for name, param in named if not param.requires_grad}
    return {name: state[name] for name in every if name in state and name not in frozen}


@torch.no_grad()
def load_whole_state_dict(
    module: nn.Module, state: dict[str, Any], strict: bool, may_lack: Collection[str] = ()
) -> None:
    """`module.load_state_dict` for whole tensors, each rank keeping its part.

    Args:
        may_lack: names that may be absent even when `strict`.

    Raises:
        RuntimeError: as `nn.Module.load_state_dict`, when names differ and `strict`, or shapes differ.
    """
    sharded = sharded_parameters(module)
    state = {names.plain(name): value for name, value in state.items()}
    mine = {name: value for name, value in state.items() if name in sharded}
    for name, value in mine.items():
        if value.shape != sharded[name].shape:
            raise RuntimeError(
                f"size mismatch for {name}: the state dictionary has {tuple(value.shape)}, "
                f"the model {tuple(sharded[name].shape)}"
            )
    make_room(module, state)
    missing, unexpected = names.load_state_dict(
        module, {name: value for name, value in state.items() if name not in sharded}
    )
    missing = [name for name in missing if name not in mine and name not in may_lack]
    if strict and (missing or unexpected):
        raise RuntimeError(
            f"the state dictionary lacks {missing} and has {unexpected}, which the model lacks"
        )
    for name, value in mine.items():
        sharded[name].store(value.to(sharded[name].group.device))


def _all_together(action: Callable[[], Any], what: str) -> list[Any]:
    return together(action, what, CheckpointError)


def custom_load(
    module: nn.Module,
    state: dict[str, Any],
    load: Callable[..., None],
    run_all: Callable[[Callable[[], Any], str], Any] = _all_together,
) -> None:
    """Let a script's function fill the module: `load(src=state, dst=module)`, divided parameters whole.

    Collective in stage 3, where what the first rank has written is kept, and wherever `run_all` is.

    Args:
        run_all: calls a function, and fails on all ranks that take part if it fails on one.

    Raises:
        CheckpointError: on every rank, when the function failed on one.
    """
    sharded = [home.group.members[home.member] for home in sharded_parameters(module).values()]

    def run() -> None:  # without the function's result, which need not be picklable
        load(src=state, dst=names.uncompiled(module))

    with GatheredParameters(sharded, modifier_rank=0 if sharded else None):
        run_all(run, "custom_load_fn")
