"""apex's other layer norm: the same arithmetic, over one dimension of any size here."""

from __future__ import annotations

import torch
from torch import nn

from xtrain.shims.apex.normalization.fused_layer_norm import fused_layer_norm_affine


class FastLayerNormFN:
    """Scripts call `.apply`."""

    @staticmethod
    def apply(
        x: torch.Tensor,
        gamma: torch.Tensor,
        beta: torch.Tensor,
        epsilon: float,
        memory_efficient: bool = False,
    ) -> torch.Tensor:
        """Layer norm over the last dimension."""
        return fused_layer_norm_affine(x, gamma, beta, gamma.shape, epsilon, memory_efficient)

    forward = apply  # Megatron looks whether it takes `memory_efficient`


class FastLayerNorm(nn.Module):
    """Layer norm over the last dimension, of size `hidden_size`."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, memory_efficient: bool = False) -> None:
        super().__init__()
        self.epsilon = eps
        self.memory_efficient = memory_efficient
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))

    def reset_parameters(self) -> None:
        """Weight ones, bias zeros."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The norm over the last dimension."""
        return FastLayerNormFN.apply(x, self.weight, self.bias, self.epsilon, self.memory_efficient)
