"""A parameter's gradient, float32 weight and optimizer states, whole or this rank's part, in every ZeRO stage.

DeepSpeed's functions and names. All are collective over the data-parallel group: every rank makes the same
call. For a parameter that no engine trains (a frozen one, say) getters return None and setters do nothing.
What getters return are copies. Parameters of DeepSpeed's engine are given to DeepSpeed's functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from xtrain.base.errors import ConfigError
from xtrain.zero.foreign import follows_the_engine
from xtrain.zero.owners import Owner, owner_of

__all__ = [
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_get_local_fp32_param",
    "safe_get_local_grad",
    "safe_get_local_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_grad",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_grad",
    "safe_set_local_optimizer_state",
    "safe_update_full_grad_vectorized",
]


@follows_the_engine
def safe_get_full_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The master weight, whole: float32 (float64 for float64 parameters), in the parameter's shape."""
    owner = owner_of(param)
    return None if owner is None else owner.gather(owner.master())


@follows_the_engine
def safe_set_full_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the master weight, and the parameter itself rounded to its own dtype, from a whole value."""
    if (owner := owner_of(param)) is not None:
        owner.store(value)


@follows_the_engine
def safe_get_full_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """An optimizer state with one value an element (`exp_avg` of Adam), whole, in the parameter's shape.

    Raises:
        ConfigError: the optimizer has no such state (none before the first step).
    """
    owner = owner_of(param)
    return None if owner is None else owner.gather(owner.state(optim_state_key))


@follows_the_engine
def safe_set_full_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set an optimizer state from a whole value; raises as `safe_get_full_optimizer_state`."""
    if (owner := owner_of(param)) is not None:
        owner.scatter(value, owner.state(optim_state_key))


@follows_the_engine
def safe_get_full_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """The gradient, averaged over ranks, whole: float32 (float64 for float64 parameters), in the parameter's shape.

    Between backward and step. With fp16 it still carries the loss scale. Before the last backward of an
    accumulation window stages 0 and 1 have not averaged yet: as in DeepSpeed, the result is then
    `param.grad`, this rank's own sum so far, if there is one. None when no gradient has arrived.
    """
    owner = owner_of(param)
    if owner is None:
        return None
    if owner.gradients_ready():
        return owner.gather(owner.gradient())
    own = owner.local_gradient()
    return None if own is None else own.to(torch.promote_types(own.dtype, torch.float32), copy=True)


@follows_the_engine
def safe_set_full_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set the averaged gradient (this rank's own, where `safe_get_full_grad` returns that) from a whole value.

    Raises:
        ConfigError: no gradient has arrived since the last step.
    """
    owner = owner_of(param)
    if owner is None:
        return
    if owner.gradients_ready():
        owner.scatter(value, owner.gradient())
    elif (own := owner.local_gradient()) is not None:
        own.copy_(value.view(owner.shape))
    else:
        raise _no_gradient(owner)


@follows_the_engine
def safe_update_full_grad_vectorized(
    param_list: Sequence[torch.nn.Parameter],
    update_func: Callable[[torch.Tensor, torch.nn.Parameter], torch.Tensor],
) -> None:
    """Replace each whole gradient g of the parameters by `update_func(g, param)`."""
    for param in param_list:
        if (grad := safe_get_full_grad(param)) is not None:
            safe_set_full_grad(param, update_func(grad, param))


@follows_the_engine
def safe_get_local_fp32_param(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's elements of the master weight, one-dimensional; empty when it holds none."""
    owner = owner_of(param)
    return None if owner is None else _local(owner, owner.master())


@follows_the_engine
def safe_set_local_fp32_param(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's elements of the master weight, then the parameter itself on all ranks."""
    if (owner := owner_of(param)) is not None:
        owner.set_local(value, owner.master())
        owner.store(owner.gather(owner.master()))


@follows_the_engine
def safe_get_local_optimizer_state(param: torch.nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's elements of an optimizer state, one-dimensional; empty when it holds none."""
    owner = owner_of(param)
    return None if owner is None else _local(owner, owner.state(optim_state_key))


@follows_the_engine
def safe_set_local_optimizer_state(
    param: torch.nn.Parameter, value: torch.Tensor, optim_state_key: str
) -> None:
    """Set this rank's elements of an optimizer state."""
    if (owner := owner_of(param)) is not None:
        owner.set_local(value, owner.state(optim_state_key))


@follows_the_engine
def safe_get_local_grad(param: torch.nn.Parameter) -> torch.Tensor | None:
    """This rank's elements of the averaged gradient, one-dimensional; None before it is averaged."""
    owner = owner_of(param)
    if owner is None or not owner.gradients_ready():
        return None
    return _local(owner, owner.gradient())


@follows_the_engine
def safe_set_local_grad(param: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Set this rank's elements of the averaged gradient.

    Raises:
        ConfigError: it has not been averaged.
    """
    owner = owner_of(param)
    if owner is None:
        return
    if not owner.gradients_ready():
        raise _no_gradient(owner)
    owner.set_local(value, owner.gradient())


def _local(owner: Owner, mine: torch.Tensor | None) -> torch.Tensor:
    wide = torch.promote_types(owner.param.dtype, torch.float32)
    if mine is None:
        return torch.empty(0, dtype=wide, device=owner.param.device)
    return mine.detach().to(wide, copy=True)


def _no_gradient(owner: Owner) -> ConfigError:
    return ConfigError(
        f"parameter {owner.name!r} has no averaged gradient: ask between the last backward of a window and step()"
    )
