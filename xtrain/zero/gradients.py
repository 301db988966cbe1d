"""Where the gradients of one flat group live, and how a bucket of them is reduced.

`WholeGradients` (stages 0 and 1) keeps every gradient on every rank; `ShardedGradients` (stage 2) keeps
this rank's slices only, and a whole bucket just while it is being reduced. When to reduce is decided
in reducer.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.zero.flat import FlatGroup
from xtrain.zero.layout import Bucket
from xtrain.zero.shards import ShardedGroup


class Summing(Protocol):
    """A bucket on the wire: `wait` returns this rank's part of the sum."""

    def wait(self) -> torch.Tensor:
        """Wait for the ranks."""


class _Alone:
    """The sum over one rank."""

    def __init__(self, result: torch.Tensor) -> None:
        self._result = result

    def wait(self) -> torch.Tensor:
        return self._result


class Gradients(ABC):
    """Gradients of one flat group, in accumulation dtype.

    Args:
        group: the flat group.
        dtype: in which micro-batch gradients are added up.
        process_group: over which buckets are summed.
        communication_dtype: in which they travel; None is `dtype`.
        predivide: they are divided by it first.
        aligned: add micro-batches and ranks by one fixed pairwise tree over slot numbers.
        average: the mean over ranks; False: the sum.
        replicas: by how many the sum is divided for the mean; None: all ranks. Ranks that share a sample
            (sequence parallelism) count as one.
    """

    def __init__(
        self,
        group: FlatGroup,
        dtype: torch.dtype,
        process_group: dist.ProcessGroup | None,
        communication_dtype: torch.dtype | None = None,
        predivide: float = 1.0,
        aligned: bool = False,
        average: bool = True,
        replicas: int | None = None,
    ) -> None:
        self.group = group
        self.dtype = dtype
        self.process_group = process_group
        self.world_size = comm.get_world_size(process_group)
        self.communication_dtype = communication_dtype or dtype
        self.predivide = predivide
        self.aligned = aligned
        self.mean_factor = predivide / (replicas or self.world_size) if average else predivide

    def _average(self, total: torch.Tensor) -> torch.Tensor:
        """Turn a sum over ranks into the mean, in place (or leave it, when sums are wanted)."""
        return total.mul_(self.mean_factor) if self.world_size > 1 else total

    def _sum(self, whole: torch.Tensor) -> Summing:
        """Start summing a bucket; the result is this rank's slice of it (all of it in stage 0)."""
        if self.world_size == 1:
            return _Alone(whole)
        sent = whole.to(self.communication_dtype)
        if self.predivide != 1.0:
            sent.div_(self.predivide)
        if self.aligned:
            whole_sum = self.group.layout.partitions == 1
            kind = comm.CanonicalAllReduce if whole_sum else comm.CanonicalReduceScatter
            return kind(sent, self.process_group)
        if self.group.layout.partitions == 1:
            return comm.SliceAllReduce(sent, self.process_group)
        return comm.SliceSum(sent, self.process_group)

    def is_foreign(self, member: int) -> bool:
        """Whether `param.grad` is a tensor that has not been absorbed."""
        return self.group.members[member].grad is not None

    @abstractmethod
    def absorb(self, member: int, bucket: Bucket) -> None:
        """Take over the gradient that has just arrived in `param.grad`."""

    def close_micro_batch(self) -> None:  # noqa: B027 - most kinds have nothing to do here
        """A backward that is not the last of its window has ended."""

    def set_aside(self) -> None:  # noqa: B027 - sharded gradients add up reduced ones anyway
        """Keep what has been reduced for `complete` to add, and begin anew."""

    @abstractmethod
    def reduce(self, bucket: Bucket) -> Summing:
        """Start summing a bucket over the ranks; returns a handle for `complete`."""

    @abstractmethod
    def complete(self, bucket: Bucket, handle: Summing) -> None:
        """Wait for `reduce`; afterwards `owned` holds the mean over ranks."""

    @abstractmethod
    def owned(self, bucket: Bucket) -> torch.Tensor:
        """This rank's slice of a bucket."""

    def piece(self, member: int) -> torch.Tensor | None:
        """This rank's elements of one parameter's gradient, a one-dimensional view; None when it has none."""
        return self.group.in_slice(member, self.owned)

    def local(self, member: int) -> torch.Tensor | None:
        """This rank's own gradient of one parameter before it is reduced, in its shape; None where it is not kept."""
        return self.group.members[member].grad

    def of_masters(self) -> list[torch.Tensor]:
        """The gradient of each of the group's masters, in its shape."""
        return [self.owned(bucket) for bucket in self.group.layout.buckets]

    @abstractmethod
    def zero(self) -> None:
        """Clear everything."""

    @property
    def device(self) -> torch.device:
        """Where they are at the moment."""
        return self.owned(self.group.layout.buckets[0]).device

    @abstractmethod
    def move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the storage by what `place` makes of it."""


class WholeGradients(Gradients):
    """One buffer of all gradients; `param.grad` is a view of it where the dtypes are the same."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = self.group
        self.buffer = comm.zeros(group.layout.total, self.dtype, group.device, self.process_group)
        self._partials: list[torch.Tensor | None] = []
        self._aside: dict[int, torch.Tensor] = {}
        # While the buffer is on another device than the parameters: which of them showed their gradient.
        self._shown_before: list[bool] | None = None
        self._attach()

    @property
    def _in_place(self) -> bool:
        # Parameters of stage 3 are empty between uses: a gradient of another shape cannot be attached.
        return self.dtype == self.group.dtype and not isinstance(self.group, ShardedGroup)

    def _attach(self) -> None:
        if self._shown_before is not None:
            self._shown_before = [True] * len(self.group.members)  # when the buffer is back
        elif self._in_place:
            for member, param in enumerate(self.group.members):
                param.grad = self.view(member)

    def is_foreign(self, member: int) -> bool:
        grad = self.group.members[member].grad
        return grad is not None and (
            grad.layout != torch.strided or grad.data_ptr() != self.view(member).data_ptr()
        )

    def view(self, member: int) -> torch.Tensor:
        """The accumulated gradient of one parameter, in its shape."""
        return self.group.member_view(self.buffer, member)

    def absorb(self, member: int, bucket: Bucket) -> None:
        param, view = self.group.members[member], self.view(member)
        if param.grad is None:
            return
        if param.grad.layout == torch.strided and param.grad.data_ptr() == view.data_ptr():
            return  # in place already
        if self._in_place:
            # Somebody replaced `param.grad` (module.zero_grad(), create_graph): it is the whole gradient now.
            view.zero_().add_(param.grad.detach())  # a sparse one can be added, and not copied
            param.grad = view
        else:
            view.add_(param.grad.detach())
            param.grad = None

    def close_micro_batch(self) -> None:
        if not self.aligned:
            return  # plain accumulation: the next micro-batch is added to the buffer
        # A binary counter of partial sums: two of the same level are added and carried to the next.
        carry = self.buffer.clone()
        self.buffer.zero_()
        for level, partial in enumerate(self._partials):
            if partial is None:
                self._partials[level] = carry
                return
            carry = partial.add_(carry)
            self._partials[level] = None
        self._partials.append(carry)

    def set_aside(self) -> None:
        aside = {bucket.start: self.owned(bucket).clone() for bucket in self.group.layout.buckets}
        self.zero()
        self._aside = aside

    def reduce(self, bucket: Bucket) -> Summing:
        whole = self.buffer[bucket.start : bucket.stop]
        for partial in self._partials:
            if partial is not None:
                whole.add_(partial[bucket.start : bucket.stop])
        return self._sum(whole)

    def complete(self, bucket: Bucket, handle: Summing) -> None:
        result, owned = handle.wait(), self.owned(bucket)
        if result.data_ptr() != owned.data_ptr():  # it travelled in a buffer of its own
            owned.copy_(result)
        self._average(owned)
        if (earlier := self._aside.pop(bucket.start, None)) is not None:
            owned.add_(earlier)
        if self.group.layout.partitions > 1:
            # Only the owned slices are meaningful now: what a script does to `.grad` must not reach them.
            for member in bucket.members:
                self.group.members[member].grad = None

    def owned(self, bucket: Bucket) -> torch.Tensor:
        return self.group.owned(self.buffer, bucket)

    def of_masters(self) -> list[torch.Tensor]:
        if self.group.by_parameter:
            return [self.view(member) for member in range(len(self.group.members))]
        return super().of_masters()

    def move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        members = self.group.members
        shown = self._shown_before or [param.grad is not None for param in members]
        self.buffer = place(self.buffer)
        if self._in_place:
            # torch refuses gradients on another device than the parameter.
            fits = all(param.device == self.buffer.device for param in members)
            for member, param in enumerate(members):
                param.grad = self.view(member) if shown[member] and fits else None
            self._shown_before = None if fits else shown

    def zero(self) -> None:
        self.buffer.zero_()
        self._partials.clear()
        self._aside.clear()
        self._attach()


class ShardedGradients(Gradients):
    """This rank's slices, added up over micro-batches; whole buckets are transient.

    Autograd's own gradient tensors are copied into a staging buffer, which exists from the first
    gradient of its bucket to the end of its reduce-scatter.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        elements = self.group.layout.total // self.group.layout.partitions
        self.shard = torch.zeros(elements, dtype=self.dtype, device=self.group.device)
        self._staging: dict[int, torch.Tensor] = {}

    def _stage(self, bucket: Bucket) -> torch.Tensor:
        if bucket.start not in self._staging:
            size = bucket.stop - bucket.start
            # Zeros, because padding and parameters without a gradient are summed too.
            self._staging[bucket.start] = torch.zeros(size, dtype=self.dtype, device=self.shard.device)
        return self._staging[bucket.start]

    def absorb(self, member: int, bucket: Bucket) -> None:
        param = self.group.members[member]
        if param.grad is None:
            return
        first = self.group.layout.starts[member] - bucket.start
        staged = self._stage(bucket)[first : first + self.group.layout.sizes[member]]
        staged.view(self.group.shapes[member]).add_(param.grad.detach())
        param.grad = None

    def local(self, member: int) -> torch.Tensor | None:
        layout = self.group.layout
        bucket = next(bucket for bucket in layout.buckets if member in bucket.members)
        if (staged := self._staging.get(bucket.start)) is None:
            return None
        first = layout.starts[member] - bucket.start
        return staged[first : first + layout.sizes[member]].view(self.group.shapes[member])

    def reduce(self, bucket: Bucket) -> Summing:
        # A gradient that comes later is staged anew.
        staged = self._stage(bucket)
        del self._staging[bucket.start]
        return self._sum(staged)

    def complete(self, bucket: Bucket, handle: Summing) -> None:
        self.owned(bucket).add_(self._average(handle.wait()))

    def owned(self, bucket: Bucket) -> torch.Tensor:
        n = self.group.layout.partitions
        return self.shard[bucket.start // n : bucket.stop // n]

    def move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.shard = place(self.shard)

    def zero(self) -> None:
        self.shard.zero_()
        self._staging.clear()
        for param in self.group.members:
            param.grad = None
