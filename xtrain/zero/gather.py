"""When the param groups of ZeRO stage 3 are whole: gathered at first use, the next ones ahead, freed after.

The order of uses in one iteration (forward and backward) is recorded, and predicts the next iteration's.
Who uses a group when is found out in model_hooks.py; how bytes move is in shards.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

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
    handles: list[Any]

    def forward(self) -> AbstractContextManager[None]:
        """Around the engine's forward."""

    def borrow(self, group: ParamGroup) -> None:
        """Make a group whole until the innermost running module ends."""

    def hook(self, module: nn.Module, groups: list[ParamGroup]) -> None:
        """Make groups whole whenever the module runs."""

    def remove(self) -> None:
        """Take the hooks off until `put_back`."""

    def put_back(self) -> None:
        """Hook the model again after its hooks were removed."""

    def abandon(self) -> None:
        """A forward or backward has raised."""

    def detach(self) -> None:
        """Let go of the model."""


class ShardedHome(Home):
    """A parameter that belongs to a param group."""

    def __init__(self, gatherer: Gatherer, param_group: ParamGroup, group: ShardedGroup, member: int) -> None:
        self.gatherer = gatherer
        self.param_group = param_group
        self.group = group
        self.member = member
        self.shape = group.shapes[member]
        self.process_group = group.process_group
        self.alone: list[bool] = []
        """For each hold that goes on: whether it concerns this parameter alone, not its param group."""
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

    def unshard(self) -> None:
        self.gatherer.lend([self])

    def reshard(self) -> None:
        self.gatherer.take_back(self)

    def store(self, whole: torch.Tensor) -> None:
        if self.param_group.users == 0:
            # What is being gathered ahead would arrive with the old value.
            self.param_group.free(self.gatherer.order)
        self.group.store(self.member, whole)


class Gatherer:
    """Gathers and frees param groups; every rank must make the same calls in the same order.

    Args:
        param_groups: in order of registration.
        process_group: for gathering alone, so that its order is independent of that of reductions.
    """

    def __init__(
        self,
        param_groups: Sequence[ParamGroup],
        process_group: dist.ProcessGroup | None,
        policy: GatherPolicy,
    ) -> None:
        self.param_groups = list(param_groups)
        for number, param_group in enumerate(self.param_groups):
            param_group.number = number
        self.order = GatherOrder(
            [param_group.name for param_group in self.param_groups],
            process_group,
            self.param_groups[0].device,
        )
        self.process_group = process_group
        self.policy = policy
        self._hooks: weakref.ref[Watcher] | None = None
        # The last iteration's uses, by whether it was training.
        self._expected: dict[bool, list[ParamGroup]] = {}
        self._uses: list[ParamGroup] = []
        self._kept: list[ParamGroup] = []
        self._training = True
        self._as_expected = True
        for param_group in self.param_groups:
            for group, bucket in param_group.parts:
                for member in bucket.members:
                    set_home(group.members[member], ShardedHome(self, param_group, group, member))

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

    def fetch(self, param_group: ParamGroup) -> None:
        """`unshard` by a module that runs: recorded, and the param groups expected next are gathered ahead."""
        if param_group.users == 0:
            self._record(param_group)
            param_group.launch(self.process_group, self.order)
            self._prefetch(len(self._uses))
        self.unshard(param_group)

    def release(self, param_group: ParamGroup) -> None:
        """Undo one `fetch`."""
        if param_group.users == 1 and self._used_again_soon(param_group):
            param_group.users = 0
        else:
            self.reshard(param_group)

    def keep(self, param_group: ParamGroup) -> None:
        """Undo one `fetch`, but at the end of the iteration only: a backward that is differentiated itself
        (a gradient penalty) has saved the weights, and where they are needed again shows nowhere."""
        self._kept.append(param_group)

    def _reshard_kept(self) -> None:
        while self._kept:
            self.reshard(self._kept.pop())

    def _record(self, param_group: ParamGroup) -> None:
        if not self._uses:
            self._training = torch.is_grad_enabled()
            self._as_expected = self._training in self._expected
        expected = self._expected.get(self._training, [])
        position = len(self._uses)
        self._as_expected = (
            self._as_expected and position < len(expected) and expected[position] is param_group
        )
        if len(self._uses) < _MOST_USES:
            self._uses.append(param_group)

    def _prefetch(self, position: int) -> None:
        if not self._as_expected:
            return
        limit, ahead = self.policy.prefetch, 0
        for param_group in self._expected[self._training][position:]:
            ahead += param_group.elements
            if limit is not None and ahead > limit:
                return
            param_group.launch(self.process_group, self.order)
            if limit is None:
                return

    def _used_again_soon(self, param_group: ParamGroup) -> bool:
        if not self._as_expected:
            return False
        distance, expected = self.policy.reuse_distance, self._expected[self._training]
        following = expected[len(self._uses) : len(self._uses) + 1]
        if distance is None:
            # A re-entrant checkpoint has just recomputed the param group's forward for its backward.
            return following == [param_group] and torch._C._current_graph_task_id() != -1
        if sum(other.elements for other in self.param_groups if other.launched) > self.policy.live:
            return False
        for other in expected[len(self._uses) :]:
            if other is param_group:
                return True
            distance -= other.elements
            if distance < 0:
                return False
        return False

    @property
    def knows_order(self) -> bool:
        """Whether an iteration was recorded, by which the next one gathers ahead."""
        return bool(self._expected)

    def forget_order(self) -> None:
        """Gather nothing ahead until another iteration was recorded."""
        self._expected, self._uses, self._as_expected = {}, [], False

    def end_iteration(self) -> None:
        """Forward and backward are over: what was recorded is expected next time; free everything unused."""
        self._reshard_kept()
        if self._uses:
            self._expected[self._training] = self._uses
            self._uses = []
        for param_group in self.param_groups:
            param_group.backward_ended = False
            if param_group.users == 0:
                param_group.free(self.order)
        self._empty_hollow()

    def _empty_hollow(self) -> None:
        for group in {group for param_group in self.param_groups for group, _ in param_group.parts}:
            group.empty_hollow()  # of a backward that has raised

    def make_idle(self) -> None:
        """Before the weights change: nothing may stay whole, for it would keep the old values.

        Raises:
            ConfigError: the script is inside `GatheredParameters`.
        """
        self.order.before_update()
        self._reshard_kept()
        for param_group in self.param_groups:
            if param_group.users or param_group.lent:
                raise ConfigError(
                    f"step() was called while the parameters of {param_group.name or 'the model'!r} are gathered: "
                    "leave the GatheredParameters context before it"
                )
        self.release_unused()

    def release_unused(self) -> None:
        """Free what is whole, or on its way, and not in use.

        A forward pass without a backward leaves param groups that were gathered ahead of it; what it used is no
        guide to the next iteration.
        """
        self._reshard_kept()
        self._uses = []
        for param_group in self.param_groups:
            if param_group.users == 0:
                param_group.free(self.order)

    def detach(self) -> None:
        """Let go of the model. Its parameters stay divided until another engine takes them over."""
        if self.hooks is not None:
            self.hooks.abandon()
            self.hooks.detach()
            self.hooks = None
        self.end_iteration()
        for param_group in self.param_groups:
            for group, bucket in param_group.parts:
                group.let_go(bucket)

    # ---------------------------------------------------------------- anybody's uses

    def lend(self, homes: Sequence[ShardedHome]) -> None:
        """Make parameters of one param group whole until each is taken back: these alone where that moves less."""
        param_group = homes[0].param_group
        members: dict[ShardedGroup, list[int]] = {}
        for home in homes:
            members.setdefault(home.group, []).append(home.member)
        moved = sum(group.elements_to_gather(some) for group, some in members.items())
        if param_group.launched or 2 * moved > param_group.elements:
            for home in homes:
                self.unshard(param_group)
                home.alone.append(False)
            return
        for group, some in members.items():
            number = number_of(param_group.number, [group.names[member] for member in some])
            self.order.compare(self.order.announce(number))
            group.lend(some, self.process_group)
        for home in homes:
            home.alone.append(True)

    def take_back(self, home: ShardedHome) -> None:
        """Undo `lend` for one parameter."""
        if home.alone.pop():
            home.group.take_back(home.member, home.param_group.whole)
        else:
            self.reshard(home.param_group)

    def unshard(self, param_group: ParamGroup) -> None:
        """Make a param group whole until `reshard` was called as often."""
        param_group.users += 1
        param_group.launch(self.process_group, self.order)
        param_group.wait(self.order)

    def reshard(self, param_group: ParamGroup) -> None:
        """Undo one `unshard`."""
        param_group.users -= 1
        if param_group.users == 0:
            param_group.free(self.order)
