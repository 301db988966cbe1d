"""`apex.parallel.SyncBatchNorm`: batch norm with the statistics of all ranks, on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F


class _Sum(torch.autograd.Function):
    """A sum over ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        """The sum."""
        ctx.group = group
        total = tensor.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """The sum of the gradients."""
        total = grads[0].clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the batches of all ranks; ranks may have batches of different sizes.

    Args:
        process_group: the ranks; None for all.
        channel_last: channels are the last dimension, else the second; with two dimensions both are the same.
        fuse_relu: the result goes through ReLU.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        channel_last: bool = False,
        fuse_relu: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group = process_group
        self.channel_last = channel_last
        self.fuse_relu = fuse_relu

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, not {input.dim()}")

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (distributed.is_available() and distributed.is_initialized()):
            return tensor
        summed: torch.Tensor = _Sum.apply(tensor, self.process_group)
        return summed

    def _update(self, mean: torch.Tensor, variance: torch.Tensor, count: torch.Tensor) -> None:
        """The running statistics, with the unbiased variance."""
        if not (self.training and self.track_running_stats):
            return
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        with torch.no_grad():
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var.dtype), factor)

    def forward(self, input: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised input, plus `z` if there is one."""
        self._check_input_dim(input)
        channels = input.dim() - 1 if self.channel_last or input.dim() == 2 else 1
        shape = [1] * input.dim()
        shape[channels] = self.num_features
        dims = [dim for dim in range(input.dim()) if dim != channels]
        whole = input if input.dtype == torch.float64 else input.float()
        if self.training or not self.track_running_stats:
            count = whole.new_tensor([input.numel() / self.num_features])
            summed = self._sum(torch.cat([whole.sum(dims), count]))
            mean, total = summed[:-1] / summed[-1], summed[-1].detach()
            away = whole - mean.view(shape)
            variance = self._sum(away.square().sum(dims)) / total
            self._update(mean, variance, total)
        else:
            assert self.running_mean is not None
            assert self.running_var is not None
            mean, variance = self.running_mean.to(whole.dtype), self.running_var.to(whole.dtype)
            away = whole - mean.view(shape)
        result = away * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        if z is not None:
            result = result + z
        return (F.relu(result) if self.fuse_relu else result).to(input.dtype)
