"""From a parameter to its divided states: gradient, master weight, optimizer states.

Whoever holds a parameter of the model can ask for them by it (xtrain.utils.safe_get_full_grad and its
kin). Works in every stage: nothing here looks at `param.data`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from xtrain import comm
from xtrain.base.errors import ConfigError
from xtrain.zero.gradients import Gradients
from xtrain.zero.home import home_of
from xtrain.zero.optimizer import ZeroOptimizer

_owners: Any = WeakIdKeyDictionary()
"""Parameter -> (weak reference to its ZeroOptimizer, number of its Gradients, member). A parameter belongs to
the engine that was built last."""


def register(optimizer: ZeroOptimizer) -> None:
    """Make the optimizer the owner of its parameters."""
    reference = weakref.ref(optimizer)
    for number, gradients in enumerate(optimizer.gradients):
        for member, param in enumerate(gradients.group.members):
            _owners[param] = (reference, number, member)


def owner_of(param: torch.Tensor) -> Owner | None:
    """What is known of a parameter; None when no engine trains it (frozen, or not given to one)."""
    reference, number, member = _owners.get(param, (lambda: None, 0, 0))
    optimizer = reference()
    return None if optimizer is None else Owner(optimizer, optimizer.gradients[number], member)


class Owner:
    """One parameter's divided states. Methods that say so are collective over the data-parallel group."""

    def __init__(self, optimizer: ZeroOptimizer, gradients: Gradients, member: int) -> None:
        self.optimizer = optimizer
        self.gradients = gradients
        self.group = gradients.group
        self.member = member
        self.param = self.group.members[member]
        self.name = self.group.names[member]
        self.shape = self.group.shapes[member]

    # ---------------------------------------------------------------- where this rank's elements are

    def master(self) -> torch.Tensor | None:
        """This rank's elements of the float32 weight; a view. None when it has none."""
        return self.group.in_master(self.member)

    def state(self, key: str) -> torch.Tensor | None:
        """This rank's elements of an optimizer state.

        Raises:
            ConfigError: there is no such state with one value an element. On every rank alike.
        """
        states = self.optimizer.state
        first = self.group.masters[self.member if self.group.by_parameter else 0]
        known = {
            name: value
            for name, value in states.get(first, {}).items()
            if torch.is_tensor(value) and value.shape == first.shape
        }
        if key not in known:
            have = f"it has {', '.join(known)}" if known else "it has none before the first step"
            kind = type(self.optimizer.optimizer).__name__
            raise ConfigError(f"{kind} keeps no state {key!r} for parameter {self.name!r}: {have}")
        return self.group.in_master(self.member, lambda master: states[master][key])

    def gradient(self) -> torch.Tensor | None:
        """This rank's elements of the averaged gradient. Ask `gradients_ready` first."""
        return self.gradients.piece(self.member)

    def gradients_ready(self) -> bool:
        """Whether this window's gradients are averaged over ranks; reduces what waits for it. Collective."""
        return self.optimizer.reducer.settle()

    def local_gradient(self) -> torch.Tensor | None:
        """In the middle of a window: this rank's own sum so far. None between windows."""
        return self.gradients.local(self.member) if self.optimizer.reducer.ran_backward else None

    # ---------------------------------------------------------------- whole values

    def gather(self, mine: torch.Tensor | None) -> torch.Tensor:
        """Every rank's elements together: float32 (float64 for float64 parameters) in the parameter's shape.

        Collective. Elements that other ranks hold are zero in the sum, so that nothing is rounded.
        """
        dtype = torch.promote_types(self.param.dtype, torch.float32)
        whole = torch.zeros(self.shape.numel(), dtype=dtype, device=self.param.device)
        if mine is not None:
            whole[self.group.own_range(self.member)].copy_(mine)
        if self.group.layout.partitions > 1:
            comm.all_reduce(whole, group=self.optimizer.process_group)
        return whole.view(self.shape)

    def scatter(self, value: torch.Tensor, mine: torch.Tensor | None) -> None:
        """Copy this rank's elements of a whole value to where they belong."""
        if value.numel() != self.shape.numel():
            raise ConfigError(
                f"a value of shape {tuple(value.shape)} does not fit parameter {self.name!r} of shape "
                f"{tuple(self.shape)}"
            )
        if mine is not None:
            mine.copy_(value.detach().reshape(-1)[self.group.own_range(self.member)])

    def set_local(self, value: torch.Tensor, mine: torch.Tensor | None) -> None:
        """Copy a value of as many elements as this rank holds to where they belong."""
        size = 0 if mine is None else mine.numel()
        if value.numel() != size:
            raise ConfigError(
                f"rank {comm.get_rank(self.optimizer.process_group)} holds {size} elements of parameter {self.name!r}, "
                f"and was given {value.numel()}"
            )
        if mine is not None:
            mine.copy_(value.detach().reshape(-1))

    def store(self, value: torch.Tensor) -> None:
        """Set the weight: masters and the parameters' own dtype; not collective."""
        self.scatter(value, None)  # checks the size
        home = home_of(self.param)
        assert home is not None
        with torch.no_grad():
            home.store(value.detach())
