"""`apex.mlp`: linear layers with an activation after each."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda input: input,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


class MLP(nn.Module):
    """Linear layers, each, the last too, followed by the activation.

    Args:
        mlp_sizes: of the input, and of what each layer gives.
        bias: whether layers have one.
        activation: none, relu or sigmoid.

    Raises:
        TypeError: another activation.
    """

    def __init__(self, mlp_sizes: Sequence[int], bias: bool = True, activation: str = "relu") -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise TypeError(f"activation must be one of {', '.join(_ACTIVATIONS)}, not {activation!r}")
        self.mlp_sizes = list(mlp_sizes)
        self.num_layers = len(mlp_sizes) - 1
        self.bias = int(bool(bias))
        self.activation = list(_ACTIVATIONS).index(activation)
        self._activate = _ACTIVATIONS[activation]
        for number in range(self.num_layers):
            inputs, outputs = mlp_sizes[number], mlp_sizes[number + 1]
            self.register_parameter(f"weight_{number}", nn.Parameter(torch.empty(outputs, inputs)))
            if bias:
                self.register_parameter(f"bias_{number}", nn.Parameter(torch.empty(outputs)))
        self.reset_parameters()

    @property
    def weights(self) -> list[nn.Parameter]:
        """The layers' weights, [outputs, inputs] each."""
        return [getattr(self, f"weight_{number}") for number in range(self.num_layers)]

    @property
    def biases(self) -> list[nn.Parameter]:
        """The layers' biases, if they have any."""
        return [getattr(self, f"bias_{number}") for number in range(self.num_layers)] if self.bias else []

    def reset_parameters(self) -> None:
        """Normal deviates: of weights with variance 2 / (inputs + outputs), of biases 1 / outputs."""
        for weight in self.weights:
            nn.init.normal_(weight, 0.0, math.sqrt(2.0 / sum(weight.shape)))
        for bias in self.biases:
            nn.init.normal_(bias, 0.0, math.sqrt(1.0 / bias.numel()))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., mlp_sizes[0]] to [..., mlp_sizes[-1]]."""
        biases: Sequence[nn.Parameter | None] = self.biases or [None] * self.num_layers
        for weight, bias in zip(self.weights, biases, strict=True):
            input = self._activate(F.linear(input, weight, bias))
        return input

    def extra_repr(self) -> str:
        return f"MLP sizes: {self.mlp_sizes}, Bias={self.bias}, activation={self.activation}"
