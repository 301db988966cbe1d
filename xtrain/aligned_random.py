"""Dropout masks that depend on where they are drawn, not on device, world size or order of ranks.

The bits come from Philox4x32-10 (Salmon et al., SC 2011), computed in integer tensor operations, which
every accelerator has and computes alike. Only dropout is covered; other random functions inside an
aligned forward pass are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from xtrain.errors import NotImplementedYetError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape with values below 2^32.
        key: two integers below 2^32.

    Returns:
        Four int64 tensors of that shape with values below 2^32.
    """
    k0, k1 = key
    x0, x1, x2, x3 = counter
    for _ in range(10):
        # The 64-bit product wraps as two's complement, whose bits are those of the unsigned product.
        first, second = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((second >> 32) & _MASK) ^ x1 ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ x3 ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [x0, x1, x2, x3]


def random_words(
    count: int, seed: int, coordinates: tuple[int, int, int], device: torch.device
) -> torch.Tensor:
    """`count` uniform 32-bit integers (int64) that are a function of seed and coordinates."""
    blocks = torch.arange(-(-count // 4), device=device)
    counter = [blocks, *(torch.full_like(blocks, value) for value in coordinates)]
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=1).flatten()[:count]


_REFUSED: dict[Any, str] = {
    F.alpha_dropout: "alpha_dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    F.feature_alpha_dropout: "feature_alpha_dropout",
    F.gumbel_softmax: "gumbel_softmax",
    F.rrelu: "rrelu",
    torch.bernoulli: "torch.bernoulli",
    torch.multinomial: "torch.multinomial",
    torch.normal: "torch.normal",
    torch.poisson: "torch.poisson",
    torch.rand: "torch.rand",
    torch.rand_like: "torch.rand_like",
    torch.randint: "torch.randint",
    torch.randn: "torch.randn",
    torch.randn_like: "torch.randn_like",
    torch.randperm: "torch.randperm",
    torch.Tensor.bernoulli_: "Tensor.bernoulli_",
    torch.Tensor.normal_: "Tensor.normal_",
    torch.Tensor.uniform_: "Tensor.uniform_",
}
_DROPOUT = (F.dropout, torch.dropout)


class AlignedRandom(TorchFunctionMode):
    """Replaces dropout inside a forward pass.

    Args:
        seed: of the run.
        place: tells (step, slot) of the running micro-batch.
    """

    def __init__(self, seed: int, place: Callable[[], tuple[int, int]]) -> None:
        super().__init__()
        self.seed = seed
        self.place = place
        self._calls = 0
        self._last: tuple[int, int] | None = None

    def _next_call(self) -> tuple[int, int, int]:
        """(number of the dropout in this micro-batch, slot, step)."""
        place = self.place()
        if place != self._last:
            self._last, self._calls = place, 0
        self._calls += 1
        return self._calls - 1, place[1], place[0]

    def _dropout(
        self,
        input: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool = True,
    ) -> torch.Tensor:
        if not (training and train) or p == 0.0:
            return input
        words = random_words(input.numel(), self.seed, self._next_call(), input.device)
        keep = (words >= round(p * 2.0**32)).view(input.shape)
        scale = 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
        result = input * (keep.to(input.dtype) * scale)
        return input.copy_(result) if inplace else result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUT:
            return self._dropout(*args, **kwargs)
        name = _REFUSED.get(func)
        if func is F.scaled_dot_product_attention and (
            kwargs.get("dropout_p") or (len(args) > 4 and args[4])
        ):
            name = "scaled_dot_product_attention with dropout"
        if name is not None:
            raise NotImplementedYetError(
                f"{name} inside an aligned forward pass",
                "use nn.Dropout, draw before the engine, or train without it",
            )
        return func(*args, **kwargs)
