"""When gradients are reduced: each bucket as soon as its last gradient has arrived.

Buckets are launched in one fixed order on every rank, whatever order gradients arrive in, so that
ranks never wait for each other in different collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import Variable

from xtrain.errors import ConfigError
from xtrain.zero.gradients import Gradients
from xtrain.zero.layout import Bucket

MAX_IN_FLIGHT = 4
"""Buckets of sharded gradients that may be on the wire at once; it bounds the transient memory."""


class _Pending:
    """One bucket in one step: whose gradients are here, and the running collective.

    `seen`: members that got a gradient in this accumulation window; `arrived`: in the running backward;
    `position`: place in the order of launching.
    """

    def __init__(self, gradients: Gradients, bucket: Bucket, last_arrival: int) -> None:
        self.gradients = gradients
        self.bucket = bucket
        self.last_arrival = last_arrival
        self.seen: set[int] = set()
        self.arrived: set[int] = set()
        self.position = 0
        self.handle: Any = None

    def name(self, member: int) -> str:
        return self.gradients.group.names[member]

    def launch(self) -> None:
        self.handle = self.gradients.reduce(self.bucket)

    def complete(self) -> None:
        self.gradients.complete(self.bucket, self.handle)
        self.arrived.clear()
        self.handle = None


class GradientReducer:
    """Watches gradients arrive and sums the buckets over the data-parallel group.

    After `finish()` every rank's owned slices hold the sum over ranks (stage 0: the whole buffer).

    Args:
        gradients: those of every flat group.
        registration_order: parameter -> position in `module.parameters()`.
        is_boundary: whether the running backward is the last of its accumulation window.
        every_backward: reduce after each backward (stage 2), not only at boundaries.
        overlap: launch during backward; otherwise when it has ended.
    """

    def __init__(
        self,
        gradients: Sequence[Gradients],
        registration_order: dict[torch.nn.Parameter, int],
        is_boundary: Callable[[], bool],
        every_backward: bool,
        overlap: bool,
    ) -> None:
        self.gradients = gradients
        self.is_boundary = is_boundary
        self.every_backward = every_backward
        self.overlap = overlap
        self.ran_backward = False
        """Whether a gradient has arrived since the last `finish_window`."""
        pending = []
        for held in gradients:
            for bucket in held.group.layout.buckets:
                first = min(registration_order[held.group.members[member]] for member in bucket.members)
                pending.append(_Pending(held, bucket, first))
        # Backward reaches the first registered parameter last.
        self.queue = sorted(pending, key=lambda item: -item.last_arrival)
        for position, item in enumerate(self.queue):
            item.position = position
        self._next = 0
        self._completed = 0
        self._in_backward = False
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._make_hook(item, member))
            for item in self.queue
            for member in item.bucket.members
            for param in [item.gradients.group.members[member]]
        ]

    def _make_hook(self, item: _Pending, member: int) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            if item.position < self._next:
                raise ConfigError(self._too_late(item.name(member)))
            if not self._in_backward:
                self._in_backward = self.ran_backward = True
                Variable._execution_engine.queue_callback(self._end_of_backward)
            item.gradients.absorb(member, item.bucket)
            item.seen.add(member)
            item.arrived.add(member)
            if self.overlap and self._reducing():
                self._launch_ready()

        return on_gradient

    def _too_late(self, name: str) -> str:
        if self._in_backward:
            return (
                f"parameter {name!r} got a second gradient in one backward after its bucket was reduced (shared "
                "by checkpointed segments?): set zero_optimization.overlap_comm to false"
            )
        return (
            f"a second backward of the same step reached parameter {name!r} after its gradients were reduced: "
            "run all but the last backward inside `with engine.no_sync():`"
        )

    def _reducing(self) -> bool:
        return self.every_backward or self.is_boundary()

    def _launch_ready(self) -> None:
        while self._next < len(self.queue):
            item = self.queue[self._next]
            if len(item.arrived) < len(item.bucket.members):
                return
            self._launch_next()

    def _launch_next(self) -> None:
        if self.every_backward and self._next - self._completed >= MAX_IN_FLIGHT:
            self.queue[self._completed].complete()
            self._completed += 1
        self.queue[self._next].launch()
        self._next += 1

    def _end_of_backward(self) -> None:
        self._in_backward = False
        if self.every_backward:
            self.finish()
        else:
            for item in self.queue[self._next :]:
                item.arrived.clear()
            if not self.is_boundary():
                for gradients in self.gradients:
                    gradients.close_micro_batch()

    def finish(self) -> None:
        """Reduce what has not been reduced (a missing gradient counts as zero) and wait for all of it."""
        while self._next < len(self.queue):
            self._launch_next()
        for item in self.queue[self._completed :]:
            item.complete()
        self._next = self._completed = 0

    def finish_window(self) -> list[str]:
        """Close an accumulation window before the update; names of parameters that got no gradient."""
        if not self.every_backward:
            self.finish()
        unused = []
        for item in self.queue:
            unused += [item.name(member) for member in item.bucket.members if member not in item.seen]
            item.seen.clear()
        self.ran_backward = False
        return unused

    def reset(self) -> None:
        """Forget a window that was given up (zero_grad, or a backward that raised)."""
        for item in self.queue[self._completed : self._next]:
            item.complete()
        for item in self.queue:
            item.arrived.clear()
            item.seen.clear()
        self._next = self._completed = 0
        self._in_backward = self.ran_backward = False

    def detach(self) -> None:
        """Remove the hooks, so that the parameters can be given to another engine."""
        for hook in self._hooks:
            hook.remove()
