"""The moments of training at which others are called: whatever watches an engine registers here.

Metrics, the run recorder, the check for silent data corruption and injected faults append functions to these lists;
the engine knows none of them. `destroy()` of the engine releases all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from xtrain.zero.train_state import TrainState

Hook = Callable[[TrainState], None]
BeforeForward = Callable[[TrainState, Any, Any], Any]
_NOTHING: AbstractContextManager[None] = nullcontext()


@dataclass(eq=False)
class Hooks:
    """Functions by moment, called in the order of registration with the engine's TrainState first.

    Attributes:
        before_forward: with the positional and named arguments; may return others (args, kwargs) to use instead.
        after_forward: with what the module has returned.
        before_backward: of a micro-batch, with its loss.
        after_differentiation: gradients are computed, and perhaps not yet reduced.
        after_backward: of a micro-batch; what can be reduced by now is.
        before_step: `step()` has begun; with whether it is an update.
        before_update: the gradients are averaged over ranks, and not applied.
        after_step: of a micro-batch, with whether it was an update.
        after_update: the step has been made, or skipped, and counted.
        on_error: a phase has raised; the error goes on.
        on_discard: the gradients of the running window were given up.
        on_load: a checkpoint was loaded, or its loading has failed.
        on_destroy: the engine ends.
    """

    before_forward: list[BeforeForward] = field(default_factory=list)
    after_forward: list[Callable[[TrainState, Any], None]] = field(default_factory=list)
    before_backward: list[Callable[[TrainState, torch.Tensor], None]] = field(default_factory=list)
    after_differentiation: list[Hook] = field(default_factory=list)
    after_backward: list[Hook] = field(default_factory=list)
    before_step: list[Callable[[TrainState, bool], None]] = field(default_factory=list)
    before_update: list[Hook] = field(default_factory=list)
    after_step: list[Callable[[TrainState, bool], None]] = field(default_factory=list)
    after_update: list[Hook] = field(default_factory=list)
    on_error: list[Hook] = field(default_factory=list)
    on_discard: list[Hook] = field(default_factory=list)
    on_load: list[Hook] = field(default_factory=list)
    on_destroy: list[Hook] = field(default_factory=list)

    def phase(self, state: TrainState) -> AbstractContextManager[None]:
        """Around a phase: calls `on_error` when it raises."""
        return self._phase(state) if self.on_error else _NOTHING

    @contextmanager
    def _phase(self, state: TrainState) -> Iterator[None]:
        try:
            yield
        except BaseException:
            for hook in self.on_error:
                hook(state)
            raise

    def release(self, state: TrainState) -> None:
        """Call `on_destroy`, and forget everybody."""
        for hook in self.on_destroy:
            hook(state)
        for hooks in vars(self).values():
            hooks.clear()
