"""apex's DistributedDataParallel and Reducer: gradients are averaged in buckets of one dtype.

apex exchanges buckets while backward runs; here they are exchanged when it ends, which gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import distributed, nn

from xtrain.shims.apex.apex_C import flatten, unflatten


def _by_dtype(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())


def _buckets(tensors: Iterable[torch.Tensor], elements: int) -> list[list[torch.Tensor]]:
    """Tensors of one dtype each, in order, a bucket closed when it has `elements` or more."""
    found = []
    for group in _by_dtype(tensors):
        bucket: list[torch.Tensor] = []
        size = 0
        for tensor in group:
            bucket.append(tensor)
            size += tensor.numel()
            if size >= elements:
                found.append(bucket)
                bucket, size = [], 0
        found += [bucket] if bucket else []
    return found


@torch.no_grad()
def _exchange(tensors: Iterable[torch.Tensor], operation: Callable[[torch.Tensor], Any]) -> None:
    """Apply a collective to flat copies of the tensors of each dtype, and copy the results back."""
    for group in _by_dtype(tensors):
        flat = flatten(group)
        operation(flat)
        for tensor, part in zip(group, unflatten(flat, group), strict=True):
            tensor.copy_(part)


def flat_dist_call(
    tensors: Iterable[torch.Tensor], call: Callable[..., Any], extra_args: tuple[Any, ...] | None = None
) -> None:
    """Apply a collective to the tensors of each dtype as one; after `all_reduce` they are averaged."""

    def operation(flat: torch.Tensor) -> None:
        call(flat, *(extra_args or ()))
        if call is distributed.all_reduce:
            flat /= distributed.get_world_size()

    _exchange(tensors, operation)


class Reducer:
    """Averages gradients over ranks when it is told to.

    Args:
        module_or_grads_list: a module, whose parameters are made rank 0's; or gradients.
    """

    def __init__(self, module_or_grads_list: nn.Module | Iterable[torch.Tensor]) -> None:
        self.module: nn.Module | None = None
        self.grads: list[torch.Tensor] = []
        if isinstance(module_or_grads_list, nn.Module):
            self.module = module_or_grads_list
            flat_dist_call([p.data for p in self.module.parameters()], distributed.broadcast, (0,))
        else:
            self.grads = [grad for grad in module_or_grads_list if isinstance(grad, torch.Tensor)]

    def reduce(self) -> None:
        """Average the gradients that there are."""
        grads = self.grads
        if self.module is not None:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        flat_dist_call(grads, distributed.all_reduce)


class DistributedDataParallel(nn.Module):
    """Averages gradients over all ranks at the end of each backward pass.

    Args:
        module: its parameters are made rank 0's.
        message_size: elements of a bucket.
        delay_allreduce: always so here.
        allreduce_always_fp32: gradients are exchanged in float32.
        gradient_average: else gradients are summed.
        gradient_predivide_factor: gradients are divided by it before the sum, and by the rest after it.
        allreduce_trigger_params, retain_allreduce_buffers, num_allreduce_streams, allreduce_communicators, prof: how
            and when apex exchanges; they change no numbers. Buffers that are to be retained are refused.

    Raises:
        NotImplementedYetError: retain_allreduce_buffers.
        ValueError: options that exclude each other, as in apex.
    """

    def __init__(
        self,
        module: nn.Module,
        message_size: int = 10000000,
        delay_allreduce: bool = False,
        shared_param: bool | None = None,
        allreduce_trigger_params: Any = None,
        retain_allreduce_buffers: bool = False,
        allreduce_always_fp32: bool = False,
        num_allreduce_streams: int = 1,
        allreduce_communicators: Any = None,
        gradient_average: bool = True,
        gradient_predivide_factor: float = 1.0,
        gradient_average_split_factor: float | None = None,
        prof: bool = False,
    ) -> None:
        super().__init__()
        self._refuse(delay_allreduce, shared_param, allreduce_trigger_params, retain_allreduce_buffers,
                     num_allreduce_streams, gradient_average_split_factor)  # fmt: skip
        self.module = module
        self.message_size = message_size
        self.delay_allreduce = delay_allreduce
        self.allreduce_always_fp32 = allreduce_always_fp32
        self.gradient_average = gradient_average
        self.gradient_predivide_factor = gradient_predivide_factor
        self.world_size = float(distributed.get_world_size())
        self._disable_allreduce = False
        self._queued = False
        flat_dist_call([p.data for p in module.parameters()], distributed.broadcast, (0,))
        for param in module.parameters():
            if param.requires_grad:
                param.register_post_accumulate_grad_hook(self._gradient_is_there)

    @staticmethod
    def _refuse(
        delayed: bool, shared: bool | None, triggers: Any, retained: bool, streams: int, split: float | None
    ) -> None:
        from xtrain.base.errors import NotImplementedYetError

        if shared is not None:
            raise ValueError("shared_param is no longer supported as an option: use delay_allreduce")
        if split is not None:
            raise ValueError("gradient_average_split_factor is gone from apex: use gradient_predivide_factor")
        if delayed and streams > 1:
            raise ValueError("num_allreduce_streams may only be used if delay_allreduce=False.")
        if delayed and triggers is not None:
            raise ValueError("Setting allreduce_trigger_params is only valid if delay_allreduce=False.")
        if retained:
            raise NotImplementedYetError(
                "apex.parallel.DistributedDataParallel(retain_allreduce_buffers=True)",
                "read the parameters' .grad",
            )

    def enable_allreduce(self) -> None:
        """Average again after `disable_allreduce`."""
        self._disable_allreduce = False

    def disable_allreduce(self) -> None:
        """Leave gradients as they are on each rank, until `enable_allreduce`."""
        self._disable_allreduce = True

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        return self.module(*inputs, **kwargs)

    def _gradient_is_there(self, param: torch.Tensor) -> None:
        if not self._queued and not self._disable_allreduce:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = False
        grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        for bucket in _buckets(grads, self.message_size):
            flat = flatten(bucket)
            exchanged = flat.float() if self.allreduce_always_fp32 else flat
            if self.gradient_predivide_factor != 1.0:
                exchanged /= self.gradient_predivide_factor
            distributed.all_reduce(exchanged)
            if self.gradient_average:
                exchanged *= self.gradient_predivide_factor / self.world_size
            for grad, part in zip(bucket, unflatten(exchanged, bucket), strict=True):
                grad.copy_(part)
