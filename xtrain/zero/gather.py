"""When the module groups of ZeRO stage 3 are whole: gathered at first use, the next ones ahead, freed after.

The order of uses in one iteration (forward and backward) is recorded, and predicts the next iteration's.
Who uses a group when is found out in hooks.py; how bytes move is in shards.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from xtrain.base.errors import ConfigError
from xtrain.zero.home import Home, set_home
from xtrain.zero.order import GatherOrder, number_of
from xtrain.zero.param_group import ParamGroup
from xtrain.zero.shards import ShardedGroup

_MOST_USES = 100_000
"""What a script that only runs forward may record; no iteration is that long."""


@dataclass(frozen=True)
class GatherPolicy:
    """How much may be whole at a time, in elements.

    Attributes:
        prefetch: gathered ahead of use; None: the next group, whatever its size.
        reuse_distance: a group is kept if no more than this is used before it is used again; None: never.
        live: groups are kept only while no more than this is whole.
    """

    prefetch: int | None = None
    reuse_distance: int | None = None
    live: int = 2**63


class Watcher(Protocol):
    """Finds out which groups a running model needs; see ModelHooks."""

    on_backward_end: Callable[[], None]

    def forward(self) -> AbstractContextManager[None]:
        """Around the engine's forward."""

    def borrow(self, group: ParamGroup) -> None:
        """Make a group whole until the innermost running module ends."""

    def hook(self, module: nn.Module, groups: list[ParamGroup]) -> None:
        """Make groups whole whenever the module runs."""

    def abandon(self) -> None:
        """A forward or backward has raised."""

    def detach(self) -> None:
        """Let go of the model."""


class UnitHome(Home):
    """A parameter that belongs to a unit."""

    def __init__(self, gatherer: Gatherer, unit: ParamGroup, group: ShardedGroup, member: int) -> None:
        self.gatherer = gatherer
        self.unit = unit
        self.group = group
        self.member = member
        self.shape = group.shapes[member]
        self.process_group = group.process_group
        self.alone: list[bool] = []
        """For each hold that goes on: whether it concerns this parameter alone, not its unit."""
        self._expects_gradient = False

    def expect_gradient(self) -> None:
        """Something may be computed from the parameter outside of the module that it belongs to."""
        param = self.group.members[self.member]
        if self._expects_gradient or not param.requires_grad:
            return
        self._expects_gradient = True
        # torch keeps hooks where Python's garbage collector does not look.
        group, member = weakref.ref(self.group), self.member

        def on_gradient(_: torch.Tensor) -> None:
            if (owner := group()) is not None:
                owner.give_shape(member)

        param.register_hook(on_gradient)

    def hold(self) -> None:
        self.gatherer.lend([self])

    def drop(self) -> None:
        self.gatherer.take_back(self)

    def store(self, whole: torch.Tensor) -> None:
        if self.unit.users == 0:
            # What is being gathered ahead would arrive with the old value.
            self.unit.release(self.gatherer.order)
        self.group.store(self.member, whole)


class Gatherer:
    """Gathers and frees units; every rank must make the same calls in the same order.

    Args:
        units: in order of registration.
        process_group: for gathering alone, so that its order is independent of that of reductions.
    """

    def __init__(
        self, units: Sequence[ParamGroup], process_group: dist.ProcessGroup | None, policy: GatherPolicy
    ) -> None:
        self.units = list(units)
        for number, unit in enumerate(self.units):
            unit.number = number
        self.order = GatherOrder([unit.name for unit in self.units], process_group, self.units[0].device)
        self.process_group = process_group
        self.policy = policy
        self._hooks: weakref.ref[Watcher] | None = None
        self._expected: dict[
            bool, list[ParamGroup]
        ] = {}  # the last iteration's uses, by whether it was training
        self._uses: list[ParamGroup] = []
        self._kept: list[ParamGroup] = []
        self._training = True
        self._as_expected = True
        for unit in self.units:
            for group, bucket in unit.parts:
                for member in bucket.members:
                    set_home(group.members[member], UnitHome(self, unit, group, member))

    @property
    def hooks(self) -> Watcher | None:
        """The model's hooks; the model keeps them alive. Every parameter leads here through its home, so that a
        strong reference would tie the model to any graph of its own that it keeps (see `ForwardCall`)."""
        return None if self._hooks is None else self._hooks()

    @hooks.setter
    def hooks(self, hooks: Watcher | None) -> None:
        self._hooks = None if hooks is None else weakref.ref(hooks)

    def on_backward_end(self, call: Callable[[], None]) -> None:
        """Call `call` whenever the backward of a group has ended."""
        if self.hooks is not None:
            self.hooks.on_backward_end = call

    # ---------------------------------------------------------------- uses by the model

    def use(self, unit: ParamGroup) -> None:
        """`hold` by a module that runs: recorded, and the units expected next are gathered ahead."""
        if unit.users == 0:
            self._record(unit)
            unit.launch(self.process_group, self.order)
            self._prefetch(len(self._uses))
        self.hold(unit)

    def done(self, unit: ParamGroup) -> None:
        """Undo one `use`."""
        if unit.users == 1 and self._used_again_soon(unit):
            unit.users = 0
        else:
            self.drop(unit)

    def keep(self, unit: ParamGroup) -> None:
        """Undo one `use`, but at the end of the iteration only: a backward that is differentiated itself
        (a gradient penalty) has saved the weights, and where they are needed again shows nowhere."""
        self._kept.append(unit)

    def _drop_kept(self) -> None:
        while self._kept:
            self.drop(self._kept.pop())

    def _record(self, unit: ParamGroup) -> None:
        if not self._uses:
            self._training = torch.is_grad_enabled()
            self._as_expected = self._training in self._expected
        expected = self._expected.get(self._training, [])
        position = len(self._uses)
        self._as_expected = self._as_expected and position < len(expected) and expected[position] is unit
        if len(self._uses) < _MOST_USES:
            self._uses.append(unit)

    def _prefetch(self, position: int) -> None:
        if not self._as_expected:
            return
        limit, ahead = self.policy.prefetch, 0
        for unit in self._expected[self._training][position:]:
            ahead += unit.elements
            if limit is not None and ahead > limit:
                return
            unit.launch(self.process_group, self.order)
            if limit is None:
                return

    def _used_again_soon(self, unit: ParamGroup) -> bool:
        if not self._as_expected:
            return False
        distance, expected = self.policy.reuse_distance, self._expected[self._training]
        following = expected[len(self._uses) : len(self._uses) + 1]
        if distance is None:
            # A re-entrant checkpoint has just recomputed the unit's forward for its backward.
            return following == [unit] and torch._C._current_graph_task_id() != -1
        if sum(other.elements for other in self.units if other.launched) > self.policy.live:
            return False
        for other in expected[len(self._uses) :]:
            if other is unit:
                return True
            distance -= other.elements
            if distance < 0:
                return False
        return False

    def end_iteration(self) -> None:
        """Forward and backward are over: what was recorded is expected next time; free everything unused."""
        self._drop_kept()
        if self._uses:
            self._expected[self._training] = self._uses
            self._uses = []
        for unit in self.units:
            unit.backward_ended = False
            if unit.users == 0:
                unit.release(self.order)
        self._empty_hollow()

    def _empty_hollow(self) -> None:
        for group in {group for unit in self.units for group, _ in unit.parts}:
            group.empty_hollow()  # of a backward that has raised

    def make_idle(self) -> None:
        """Before the weights change: nothing may stay whole, for it would keep the old values.

        Raises:
            ConfigError: the script is inside `GatheredParameters`.
        """
        self.order.before_update()
        self._drop_kept()
        for unit in self.units:
            if unit.users or unit.lent:
                raise ConfigError(
                    f"step() was called while the parameters of {unit.name or 'the model'!r} are gathered: "
                    "leave the GatheredParameters context before it"
                )
        self.release_unused()

    def release_unused(self) -> None:
        """Free what is whole, or on its way, and not in use.

        A forward pass without a backward leaves units that were gathered ahead of it; what it used is no
        guide to the next iteration.
        """
        self._drop_kept()
        self._uses = []
        for unit in self.units:
            if unit.users == 0:
                unit.release(self.order)

    def detach(self) -> None:
        """Let go of the model. Its parameters stay divided until another engine takes them over."""
        if self.hooks is not None:
            self.hooks.abandon()
            self.hooks.detach()
            self.hooks = None
        self.end_iteration()
        for unit in self.units:
            for group, bucket in unit.parts:
                group.let_go(bucket)

    # ---------------------------------------------------------------- anybody's uses

    def lend(self, homes: Sequence[UnitHome]) -> None:
        """Make parameters of one unit whole until each is taken back: these alone where that moves less."""
        unit = homes[0].unit
        members: dict[ShardedGroup, list[int]] = {}
        for home in homes:
            members.setdefault(home.group, []).append(home.member)
        moved = sum(group.elements_to_gather(some) for group, some in members.items())
        if unit.launched or 2 * moved > unit.elements:
            for home in homes:
                self.hold(unit)
                home.alone.append(False)
            return
        for group, some in members.items():
            number = number_of(unit.number, [group.names[member] for member in some])
            self.order.compare(self.order.announce(number))
            group.lend(some, self.process_group)
        for home in homes:
            home.alone.append(True)

    def take_back(self, home: UnitHome) -> None:
        """Undo `lend` for one parameter."""
        if home.alone.pop():
            home.group.take_back(home.member, home.unit.whole)
        else:
            self.drop(home.unit)

    def hold(self, unit: ParamGroup) -> None:
        """Make a unit whole until `drop` was called as often."""
        unit.users += 1
        unit.launch(self.process_group, self.order)
        unit.wait(self.order)

    def drop(self, unit: ParamGroup) -> None:
        """Undo one `hold`."""
        unit.users -= 1
        if unit.users == 0:
            unit.release(self.order)
