"""Finding out which param groups a running model needs, in forward and in backward.

Forward: a group is needed from the first use of one of its modules or parameters to the end of the
module that used it. Backward: from the moment that gradients reach the outputs of a forward call until
they reach the outputs of a call that had ended before. The autograd engine runs nodes in reverse order
of creation, so everything of the first call is then behind it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from xtrain.base.errors import ConfigError
from xtrain.zero.gather import Gatherer, ShardedHome
from xtrain.zero.home import home_of
from xtrain.zero.late_arrivals import LateArrivals
from xtrain.zero.param_group import ParamGroup


class WatchedParameters(dict[str, Any]):
    """`module._parameters` that makes a parameter whole when running code reads it.

    Args:
        parent_module: the module.
        args: its parameters, as `dict` takes them.
    """

    def __init__(self, parent_module: nn.Module | None = None, *args: Any) -> None:
        super().__init__(*args)

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        home = None if param is None else home_of(param)
        if isinstance(home, ShardedHome) and not home.param_group.users and home.gatherer.hooks is not None:
            home.gatherer.hooks.borrow(home.param_group)
        return param

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        """Ordinary parameters, where these are whole.

        Raises:
            ConfigError: they are not, and the copies would be empty.
        """
        for name, param in self.items():
            home = home_of(param) if param is not None else None
            if isinstance(home, ShardedHome) and home.shape.numel() and not param.numel():
                raise ConfigError(
                    f"copy.deepcopy() of a module whose parameter {name!r} is divided over ranks (ZeRO stage 3): copy "
                    "it inside zero.GatheredParameters(model.parameters()), which every rank enters, or copy "
                    "engine.module_state_dict()"
                )
        return {name: copy.deepcopy(param, memo) for name, param in self.items()}

    def __setitem__(self, name: str, value: Any) -> None:
        former = self.get(name)
        home = None if former is None else home_of(former)
        emptied = torch.is_tensor(value) and value is not former and not value.numel()
        if emptied and isinstance(home, ShardedHome) and home.shape.numel():
            raise ConfigError(
                f"parameter {home.group.names[home.member]!r} was replaced by an empty tensor: something was "
                "computed from parameters while ZeRO stage 3 had them divided; compute it, and call "
                "torch.func.functional_call, inside zero.GatheredParameters(model.parameters())"
            )
        super().__setitem__(name, value)


def external_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of other modules that `register_external_parameter` announced for this one."""
    return module.__dict__.setdefault("_xtrain_external", [])


def _tensors_in(outputs: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Tensors in what a module returned: containers, and classes of the script's own down to `depth`."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif depth and not isinstance(leaf, (str, bytes, type, nn.Module)):
            if isinstance(leaf, Mapping):
                inside: list[Any] = list(leaf.values())
            elif isinstance(leaf, (list, tuple)):  # a subclass
                inside = list(leaf)
            elif dataclasses.is_dataclass(leaf):
                inside = [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
            else:
                inside = list(getattr(leaf, "__dict__", {}).values())
            for value in inside:
                yield from _tensors_in(value, depth - 1)


class ForwardCall:
    """A use of a param group in forward, by a module that runs: the backward of what it computed needs it again.

    The autograd graph keeps it alive, and a model may keep a graph (a loss in an attribute). The garbage collector
    does not see through graphs, so it holds nothing that leads back to the model.

    Args:
        started: when the module began to use it.
    """

    def __init__(self, hooks: ModelHooks, param_group: ParamGroup, started: float) -> None:
        self._hooks, self._unit = weakref.ref(hooks), weakref.ref(param_group)
        self.started = started
        self.ended = math.inf
        self.entered = False
        self.differentiated = False  # whether its backward is recorded (create_graph)

    def enter(self, _: torch.Tensor) -> None:
        """A gradient has reached an output."""
        hooks, param_group = self._hooks(), self._unit()
        if hooks is None or param_group is None:
            return  # the engine is gone
        hooks.leave_later_than(self.ended)
        if not self.entered:
            self.entered = True
            hooks.running.append(self)
            hooks.gatherer.fetch(param_group)
            self.differentiated = torch.is_grad_enabled()
            # For the calls that nothing precedes, and for re-entrant checkpoints, whose backward is nested.
            torch.autograd.Variable._execution_engine.queue_callback(self.leave)

    def leave(self) -> None:
        """Backward is done with it (or was given up)."""
        hooks, param_group = self._hooks(), self._unit()
        if self.entered and hooks is not None and param_group is not None:
            self.entered = False
            hooks.running.remove(self)
            param_group.calls.discard(self)
            param_group.backward_ended = True
            if self.differentiated:
                hooks.gatherer.keep(param_group)
            else:
                hooks.gatherer.release(param_group)
            hooks.on_backward_end()


class _Frame:
    """A module that is running.

    Attributes:
        first_node: number of the first node of the autograd graph that it may make.
        uses: param groups that it has made whole, to be let go of when it ends.
        inner: uses, by outer modules, of param groups that hold parameters of this one. Its outputs are watched
            too: gradients may come to them by a way around the outer module's (a loss kept in an attribute,
            a hidden state that a hook has seen, a class that hides the outer outputs).
    """

    def __init__(self) -> None:
        self.first_node: int = torch.autograd._get_sequence_nr()
        self.uses: dict[ParamGroup, ForwardCall] = {}
        self.inner: dict[ParamGroup, ForwardCall] = {}


class ModelHooks:
    """Forward and backward hooks on the modules of one model.

    Args:
        module: the model.
        gatherer: of its param groups.
        on_backward_end: called when the backward of a param group has ended.

    Attributes:
        handles: of the hooks; whoever removes them all keeps this object alive, which they did.
    """

    def __init__(
        self,
        module: nn.Module,
        gatherer: Gatherer,
        on_backward_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.gatherer = gatherer
        self.on_backward_end = on_backward_end
        self.running: list[ForwardCall] = []
        self._frames: list[_Frame] = []
        self._clock = itertools.count()
        self.handles: list[Any] = []
        self._hooked: list[tuple[nn.Module, list[ParamGroup]]] = []
        self._watched: list[nn.Module] = []
        gatherer.hooks = self
        modules: dict[nn.Module | None, list[ParamGroup]] = defaultdict(list)
        for param_group in gatherer.param_groups:
            modules[param_group.module].append(param_group)
        self._known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        for child in module.modules():
            self._take_in(child, modules.get(child, []), always=child is module)
        self._arrivals = LateArrivals(self._known, self._take_in_late, self._watch)

    def _take_in(self, module: nn.Module, param_groups: list[ParamGroup], always: bool = False) -> None:
        self._known.add(module)
        owned = [*module.parameters(recurse=False), *external_parameters(module)]
        homes = [home for home in map(home_of, owned) if isinstance(home, ShardedHome)]
        if any(True for _ in module.parameters(recurse=False)):
            self._watch(module)
        used = list(dict.fromkeys([*param_groups, *(home.param_group for home in homes)]))
        if used or always:
            self.hook(module, used)

    def _take_in_late(self, module: nn.Module) -> None:
        """A module that the model was given after it was divided; it may hold parameters that are."""
        for child in module.modules():
            if child not in self._known:
                self._take_in(child, [])

    def _watch(self, module: nn.Module) -> None:
        if not isinstance(module._parameters, WatchedParameters):
            module._parameters = WatchedParameters(module, module._parameters)
            self._watched.append(module)

    def hook(self, module: nn.Module, param_groups: list[ParamGroup]) -> None:
        """Make `param groups` whole whenever `module` runs."""
        self._hooked.append((module, param_groups))
        self._register(module, param_groups)

    def _register(self, module: nn.Module, param_groups: list[ParamGroup]) -> None:
        # copy.deepcopy copies hooks, too: the copy has its own parameters, and may run on one rank only.
        # torch.compile must not trace them: what is compiled runs between them, with whole parameters.
        @torch.compiler.disable
        def before(running: nn.Module, _: Any) -> None:
            if running is module:
                self._frames.append(_Frame())
                for param_group in param_groups:
                    self.borrow(param_group)

        @torch.compiler.disable
        def after(running: nn.Module, _: Any, outputs: Any) -> None:
            if running is module:
                self._end_frame(outputs)

        self.handles.append(module.register_forward_pre_hook(before, prepend=True))
        # Called when forward raised, too.
        self.handles.append(module.register_forward_hook(after, always_call=True))

    @torch.compiler.disable
    def borrow(self, param_group: ParamGroup) -> None:
        """Make a param group whole until the innermost running module ends (nothing without one)."""
        if not self._frames:
            return
        call = next((frame.uses[param_group] for frame in self._frames if param_group in frame.uses), None)
        if call is None:
            self._frames[-1].uses[param_group] = ForwardCall(self, param_group, next(self._clock))
            param_group.ever_called = True
            self.gatherer.fetch(param_group)
        elif param_group not in self._frames[-1].uses:
            self._frames[-1].inner[param_group] = call

    def _end_frame(self, outputs: Any) -> None:
        frame = self._frames.pop()
        tensors = list({id(tensor): tensor for tensor in _tensors_in(outputs)}.values())
        ended = next(self._clock)
        if torch.is_grad_enabled():
            for tensor in self._where_gradients_arrive(frame, tensors):
                if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                    for call in (*frame.uses.values(), *frame.inner.values()):
                        tensor.register_hook(call.enter)
                    for param_group, call in frame.uses.items():
                        param_group.calls.add(call)
        for param_group, call in frame.uses.items():
            if self._frames and any(self._belongs(tensor, param_group) for tensor in tensors):
                # A module that returns its parameter (a bias to be added later) lends it to the caller.
                self._mark_external(tensors, param_group)
                self._frames[-1].uses[param_group] = call
                continue
            call.ended = ended
            self.gatherer.release(param_group)
        if not (self._frames or self.running or torch.is_grad_enabled()):
            self.gatherer.end_iteration()  # an evaluation: no backward will end it

    @staticmethod
    def _where_gradients_arrive(frame: _Frame, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, and the tensors that they are views of, where the module has made these.

        When a script changes a view in place (`h = linear(x); h += x`), torch gives it a new history, which leads
        through what it is a view of and past the node whose gradient a hook on the view awaits.
        """
        bases = {id(output._base): output._base for output in outputs if output._is_view()}
        made = [
            base
            for base in bases.values()
            if base is not None
            and base.grad_fn is not None
            and base.grad_fn._sequence_nr() >= frame.first_node
        ]
        return [*outputs, *made]

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the engine's forward. torch calls no hooks when Ctrl-C interrupts a module: it ends here."""
        outside = len(self._frames)
        try:
            yield
        except BaseException:
            while len(self._frames) > outside:
                self._end_frame(None)
            raise

    @staticmethod
    def _belongs(tensor: torch.Tensor, param_group: ParamGroup) -> bool:
        home = home_of(tensor)
        return isinstance(home, ShardedHome) and home.param_group is param_group

    @classmethod
    def _mark_external(cls, tensors: list[torch.Tensor], param_group: ParamGroup) -> None:
        for tensor in tensors:
            if cls._belongs(tensor, param_group):
                tensor.is_external_param = True  # type: ignore[attr-defined]

    def leave_later_than(self, moment: float) -> None:
        """Backward has come to a call that had ended at `moment`: it is done with what started after it."""
        for call in [call for call in self.running if call.started > moment]:
            call.leave()

    def abandon(self) -> None:
        """A forward or backward has raised: nothing is running any more."""
        for frame in self._frames:
            for param_group in frame.uses:
                self.gatherer.release(param_group)
        self._frames.clear()
        for call in list(self.running):
            call.leave()

    def detach(self) -> None:
        """Remove all hooks."""
        self._arrivals.stop()
        self.remove()
        for module in self._watched:
            module._parameters = dict(module._parameters)
        self._hooked, self._watched = [], []

    def remove(self) -> None:
        """Take the hooks off: a module runs with what its parameters hold, until `put_back`."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def put_back(self) -> None:
        """Put the hooks on, wherever some or all of them were removed."""
        self.remove()
        for module, param_groups in self._hooked:
            self._register(module, param_groups)
