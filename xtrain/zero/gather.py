"""When the module groups of ZeRO stage 3 are whole: gathered at first use, the next ones ahead, freed after.

The order of uses in one iteration (forward and backward) is recorded, and predicts the next iteration's.
Who uses a group when is found out in hooks.py; how bytes move is in shards.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from xtrain.errors import ConfigError, NotImplementedYetError
from xtrain.zero.home import Home, set_home
from xtrain.zero.layout import Bucket
from xtrain.zero.order import GatherOrder, number_of
from xtrain.zero.shards import ShardedGroup

if TYPE_CHECKING:
    from xtrain.zero.hooks import ForwardCall, ModelHooks


class Unit:
    """One module group: the buckets that hold its parameters, and who needs them.

    Attributes:
        number: place among the gatherer's units.
        users: how many uses are going on; the parameters are whole while there is one.
        calls: forward calls that used the unit and whose backward has not ended.
        ever_called: whether any forward has used it.
        backward_ended: whether the backward of some call has ended in the running backward.
    """

    def __init__(self, name: str, parts: Sequence[tuple[ShardedGroup, Bucket]]) -> None:
        self.name = name
        self.parts = list(parts)
        self.elements = sum(bucket.stop - bucket.start for _, bucket in self.parts)
        self.users = 0
        self.whole = False
        self.calls: weakref.WeakSet[ForwardCall] = weakref.WeakSet()
        self.ever_called = False
        self.backward_ended = False
        self.number = 0
        self._works: list[Any] | None = None
        self._announced: Any = None

    @property
    def device(self) -> torch.device:
        """Where its parameters are used."""
        return self.parts[0][0].device

    @property
    def launched(self) -> bool:
        """Whether memory is in use for it."""
        return self.whole or self._works is not None

    @property
    def lent(self) -> bool:
        """Whether some of its parameters have been gathered without the others, for a script."""
        return any(
            member in group.lent for group, bucket in self.parts if group.lent for member in bucket.members
        )

    def launch(self, process_group: dist.ProcessGroup | None, order: GatherOrder) -> None:
        """Start gathering, unless that has been done."""
        if not self.launched:
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise NotImplementedYetError(
                    "torch.func over a model of ZeRO stage 3",
                    "wrap the call in zero.GatheredParameters(model.parameters()), or use stage 2",
                )
            with order.explained():
                self._announced = order.announce(self.number)
                self._works = [
                    group.launch(bucket, process_group, self.number) for group, bucket in self.parts
                ]

    def wait(self, order: GatherOrder) -> None:
        """Wait for `launch`; afterwards the parameters are whole."""
        if self._works is not None:
            with order.explained():
                order.compare(self._announced)
                for work in self._works:
                    if work is not None:
                        work.wait()
            self._works = self._announced = None
            for group, bucket in self.parts:
                group.attach(bucket)
            self.whole = True

    def release(self, order: GatherOrder) -> None:
        """Give the memory back."""
        if self._works is not None and order.broken is not None:
            return  # what is on its way may never come, and would be written into this memory
        self.wait(order)
        if self.whole:
            for group, bucket in self.parts:
                group.release(bucket)
            self.whole = False


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


class UnitHome(Home):
    """A parameter that belongs to a unit."""

    def __init__(self, gatherer: Gatherer, unit: Unit, group: ShardedGroup, member: int) -> None:
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
        self, units: Sequence[Unit], process_group: dist.ProcessGroup | None, policy: GatherPolicy
    ) -> None:
        self.units = list(units)
        for number, unit in enumerate(self.units):
            unit.number = number
        self.order = GatherOrder([unit.name for unit in self.units], process_group, self.units[0].device)
        self.process_group = process_group
        self.policy = policy
        self._hooks: weakref.ref[ModelHooks] | None = None
        self._expected: dict[bool, list[Unit]] = {}  # the last iteration's uses, by whether it was training
        self._uses: list[Unit] = []
        self._kept: list[Unit] = []
        self._training = True
        self._as_expected = True
        for unit in self.units:
            for group, bucket in unit.parts:
                for member in bucket.members:
                    set_home(group.members[member], UnitHome(self, unit, group, member))

    @property
    def hooks(self) -> ModelHooks | None:
        """The model's hooks; the model keeps them alive. Every parameter leads here through its home, so that a
        strong reference would tie the model to any graph of its own that it keeps (see `ForwardCall`)."""
        return None if self._hooks is None else self._hooks()

    @hooks.setter
    def hooks(self, hooks: ModelHooks | None) -> None:
        self._hooks = None if hooks is None else weakref.ref(hooks)

    # ---------------------------------------------------------------- uses by the model

    def use(self, unit: Unit) -> None:
        """`hold` by a module that runs: recorded, and the units expected next are gathered ahead."""
        if unit.users == 0:
            self._record(unit)
            unit.launch(self.process_group, self.order)
            self._prefetch(len(self._uses))
        self.hold(unit)

    def done(self, unit: Unit) -> None:
        """Undo one `use`."""
        if unit.users == 1 and self._used_again_soon(unit):
            unit.users = 0
        else:
            self.drop(unit)

    def keep(self, unit: Unit) -> None:
        """Undo one `use`, but at the end of the iteration only: a backward that is differentiated itself
        (a gradient penalty) has saved the weights, and where they are needed again shows nowhere."""
        self._kept.append(unit)

    def _drop_kept(self) -> None:
        while self._kept:
            self.drop(self._kept.pop())

    def _record(self, unit: Unit) -> None:
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

    def _used_again_soon(self, unit: Unit) -> bool:
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

    def hold(self, unit: Unit) -> None:
        """Make a unit whole until `drop` was called as often."""
        unit.users += 1
        unit.launch(self.process_group, self.order)
        unit.wait(self.order)

    def drop(self, unit: Unit) -> None:
        """Undo one `hold`."""
        unit.users -= 1
        if unit.users == 0:
            unit.release(self.order)
