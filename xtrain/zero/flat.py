"""The state of one flat group: parameters, gradients and master weights of equal dtype and options.

Parameters stay ordinary tensors whose storage is a slice of `params`. Gradients are added up in
`grads`; where the accumulation dtype is the parameters' own, `param.grad` is a view of it and nothing
is ever copied. When to reduce or gather is decided elsewhere (reducer.py, optimizer.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from xtrain.zero.layout import Bucket, Layout, cut


@dataclass(frozen=True)
class FlatOptions:
    """How to cut: `partitions` ranks share the optimizer states, `partition` is this rank's number."""

    partitions: int
    partition: int
    bucket_size: int
    alignment_bytes: int


class FlatGroup:
    """Parameters of one optimizer group and dtype, in one buffer.

    Attributes:
        names, members: the parameters in buffer order (reverse of registration, the order in which
            their gradients arrive).
        params: (total,) parameter dtype.
        grads: (total,) accumulation dtype.
        masters: per bucket, this rank's slice in float32 (float64 for float64 parameters); views of
            `params` when the dtypes are the same.
    """

    def __init__(
        self,
        members: Sequence[tuple[str, torch.nn.Parameter]],
        group_index: int,
        accumulation_dtype: torch.dtype,
        options: FlatOptions,
    ) -> None:
        self.names = [name for name, _ in members]
        self.members = [param for _, param in members]
        self.group_index = group_index
        self.partition = options.partition
        dtype, device = self.members[0].dtype, self.members[0].device
        align = max(1, options.alignment_bytes // min(dtype.itemsize, accumulation_dtype.itemsize))
        self.layout: Layout = cut(
            [param.numel() for param in self.members], options.partitions, options.bucket_size, align
        )
        self.params = torch.zeros(self.layout.total, dtype=dtype, device=device)
        self.grads = torch.zeros(self.layout.total, dtype=accumulation_dtype, device=device)
        for member, param in enumerate(self.members):
            view = self.param_view(member)
            view.copy_(param.detach())
            param.data = view
        self.masters = self._make_masters()
        self.attach_grads()

    @property
    def grads_in_place(self) -> bool:
        """Whether `param.grad` is a view of the gradient buffer."""
        return self.params.dtype == self.grads.dtype

    def _member_view(self, buffer: torch.Tensor, member: int) -> torch.Tensor:
        start = self.layout.starts[member]
        return buffer[start : start + self.layout.sizes[member]].view(self.members[member].shape)

    def param_view(self, member: int) -> torch.Tensor:
        """The parameter as a view of the buffer, in its own shape."""
        return self._member_view(self.params, member)

    def grad_view(self, member: int) -> torch.Tensor:
        """The accumulated gradient as a view of the buffer, in the parameter's shape."""
        return self._member_view(self.grads, member)

    def bucket(self, buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """A whole bucket of `params` or `grads`."""
        return buffer[bucket.start : bucket.stop]

    def owned(self, buffer: torch.Tensor, bucket: Bucket) -> torch.Tensor:
        """This rank's slice of a bucket of `params` or `grads`."""
        start, stop = self.layout.owned(bucket, self.partition)
        return buffer[start:stop]

    def _make_masters(self) -> list[torch.nn.Parameter]:
        # `to` returns the view itself when the dtype is the same.
        dtype = torch.promote_types(self.params.dtype, torch.float32)
        return [
            torch.nn.Parameter(self.owned(self.params, bucket).to(dtype), requires_grad=False)
            for bucket in self.layout.buckets
        ]

    def refresh_masters(self) -> None:
        """Set the masters from the parameters (after the module's weights were loaded or broadcast)."""
        for bucket, master in zip(self.layout.buckets, self.masters, strict=True):
            master.data.copy_(self.owned(self.params, bucket))

    def publish_masters(self) -> None:
        """Round the masters into this rank's slices of the parameters."""
        for bucket, master in zip(self.layout.buckets, self.masters, strict=True):
            if master.dtype != self.params.dtype:
                self.owned(self.params, bucket).copy_(master.data)

    def attach_grads(self) -> None:
        """Point `param.grad` at the gradient buffer (in-place mode only)."""
        if self.grads_in_place:
            for member, param in enumerate(self.members):
                param.grad = self.grad_view(member)

    def absorb_grad(self, member: int) -> None:
        """Make sure that the gradient which just arrived is in the buffer.

        In place this is nothing, unless somebody replaced `param.grad` (`zero_grad(set_to_none=True)`).
        Otherwise the gradient is added in the accumulation dtype and released.
        """
        param, view = self.members[member], self.grad_view(member)
        if param.grad is None or param.grad.data_ptr() == view.data_ptr():
            return
        view.add_(param.grad)
        param.grad = view if self.grads_in_place else None

    def zero_grads(self) -> None:
        """Clear the gradient buffer."""
        self.grads.zero_()
        self.attach_grads()
