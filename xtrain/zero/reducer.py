"""When gradients are reduced: each bucket as soon as its last gradient has arrived.

Buckets are launched in one fixed order on every rank, whatever order gradients arrive in, so that
ranks never wait for each other in different collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.errors import ConfigError
from xtrain.zero.flat import FlatGroup
from xtrain.zero.layout import Bucket


class _Pending:
    """One bucket in one step: whose gradients are here, and the running collective.

    `seen`: members that got a gradient in this accumulation window; `arrived`: in its last backward.
    """

    def __init__(self, group: FlatGroup, bucket: Bucket, last_arrival: int) -> None:
        self.group = group
        self.bucket = bucket
        self.last_arrival = last_arrival
        self.seen: set[int] = set()
        self.arrived: set[int] = set()
        self.launched = False
        self.work: Any = None

    @property
    def complete(self) -> bool:
        return len(self.arrived) == len(self.bucket.members)

    def reset(self) -> None:
        self.seen.clear()
        self.arrived.clear()
        self.launched = False
        self.work = None


class GradientReducer:
    """Watches gradients arrive and sums the buckets over the data-parallel group.

    After `finish()` every rank's owned slices hold the sum over ranks (stage 0: the whole buffer).

    Args:
        groups: the flat groups.
        registration_order: parameter -> position in `module.parameters()`.
        process_group: the data-parallel group.
        is_boundary: whether the running backward is the last of its accumulation window.
        overlap: launch during backward; otherwise all buckets are reduced in `finish()`.
    """

    def __init__(
        self,
        groups: Sequence[FlatGroup],
        registration_order: dict[torch.nn.Parameter, int],
        process_group: dist.ProcessGroup | None,
        is_boundary: Callable[[], bool],
        overlap: bool,
    ) -> None:
        self.process_group = process_group
        self.world_size = comm.get_world_size(process_group)
        self.is_boundary = is_boundary
        self.overlap = overlap
        self.unused: list[str] = []
        """Names of the parameters that got no gradient in the window that `finish` closed."""
        pending = []
        for group in groups:
            for bucket in group.layout.buckets:
                first = min(registration_order[group.members[member]] for member in bucket.members)
                pending.append(_Pending(group, bucket, first))
        # Backward reaches the first registered parameter last.
        self.queue = sorted(pending, key=lambda item: -item.last_arrival)
        self._next = 0
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._make_hook(item, member))
            for item in self.queue
            for member in item.bucket.members
            for param in [item.group.members[member]]
        ]

    def _make_hook(self, item: _Pending, member: int) -> Callable[[torch.Tensor], None]:
        def on_gradient(_: torch.Tensor) -> None:
            if item.launched:
                raise ConfigError(
                    f"a second backward of the same step reached parameter {item.group.names[member]!r} after its "
                    "gradients were reduced: run all but the last backward inside `with engine.no_sync():`"
                )
            item.group.absorb_grad(member)
            item.seen.add(member)
            if self.overlap and self.is_boundary():
                item.arrived.add(member)
                self._launch_complete()

        return on_gradient

    def _launch_complete(self) -> None:
        while self._next < len(self.queue) and self.queue[self._next].complete:
            self._launch(self.queue[self._next])
            self._next += 1

    def _launch(self, item: _Pending) -> None:
        item.launched = True
        if self.world_size == 1:
            return
        grads = item.group.bucket(item.group.grads, item.bucket)
        if item.group.layout.partitions == 1:
            item.work = comm.all_reduce(grads, group=self.process_group, async_op=True)
        else:
            owned = item.group.owned(item.group.grads, item.bucket)
            item.work = comm.reduce_scatter_tensor(owned, grads, group=self.process_group, async_op=True)

    def finish(self) -> None:
        """Launch what is left (parameters that got no gradient count as zero) and wait for all of it."""
        self.unused = [
            item.group.names[member]
            for item in self.queue
            for member in item.bucket.members
            if member not in item.seen
        ]
        for item in self.queue[self._next :]:
            self._launch(item)
        for item in self.queue:
            if item.work is not None:
                item.work.wait()
            item.reset()
        self._next = 0

    def detach(self) -> None:
        """Remove the hooks, so that the parameters can be given to another engine."""
        for hook in self._hooks:
            hook.remove()
