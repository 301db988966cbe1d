"""Dropout masks that depend on where they are drawn, not on device, world size or order of ranks.

The bits come from Philox4x32-10 (Salmon et al., SC 2011), computed in integer tensor operations, which
every accelerator has and computes alike. Only dropout is covered; other random functions inside an
aligned forward pass are refused by name. Drawing initial weights is in aligned_draws.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode

from xtrain.base.errors import NotImplementedYetError

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
    count: int, seed: int, coordinates: tuple[int, int, int], device: torch.device, first_block: int = 0
) -> torch.Tensor:
    """`count` uniform 32-bit integers (int64) that are a function of seed and coordinates.

    Args:
        first_block: words from the 4 x `first_block`-th on.
    """
    blocks = torch.arange(first_block, first_block - (-count // 4), device=device)
    counter = [blocks, *(torch.full_like(blocks, value) for value in coordinates)]
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=1).flatten()[:count]


_REFUSED: dict[Any, str] = {
    F.alpha_dropout: "alpha_dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    F.feature_alpha_dropout: "feature_alpha_dropout",
    F.fractional_max_pool2d: "fractional_max_pool2d",
    F.fractional_max_pool3d: "fractional_max_pool3d",
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
    torch.randint_like: "torch.randint_like",
    torch.Tensor.bernoulli: "Tensor.bernoulli",
    torch.Tensor.bernoulli_: "Tensor.bernoulli_",
    torch.Tensor.cauchy_: "Tensor.cauchy_",
    torch.Tensor.exponential_: "Tensor.exponential_",
    torch.Tensor.geometric_: "Tensor.geometric_",
    torch.Tensor.log_normal_: "Tensor.log_normal_",
    torch.Tensor.multinomial: "Tensor.multinomial",
    torch.Tensor.normal_: "Tensor.normal_",
    torch.Tensor.random_: "Tensor.random_",
    torch.Tensor.uniform_: "Tensor.uniform_",
}
_DROPOUT = (F.dropout, torch.dropout)
_RECURRENT = {torch.lstm: "LSTM", torch.gru: "GRU", torch.rnn_tanh: "RNN", torch.rnn_relu: "RNN"}


def _hidden_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Name of a function that drops out inside of itself, where masks cannot be replaced."""
    if func is F.scaled_dot_product_attention and (kwargs.get("dropout_p") or (len(args) > 4 and args[4])):
        return "scaled_dot_product_attention with dropout"
    if func is F.multi_head_attention_forward:
        dropout = args[10] if len(args) > 10 else kwargs.get("dropout_p")
        training = args[13] if len(args) > 13 else kwargs.get("training", True)
        return "nn.MultiheadAttention with dropout" if dropout and training else None
    if func in _RECURRENT:
        # The only float among the arguments is the dropout; whether it is training comes next.
        for value, training in pairwise(args):
            if isinstance(value, float) and value > 0 and training:
                return f"nn.{_RECURRENT[func]} with dropout"
    return None


class AlignedRandom(TorchFunctionMode):
    """Replaces dropout inside a forward pass, and inside what checkpointing recomputes of it.

    Args:
        seed: of the run.
        place: tells (step, slot) of the running micro-batch.
        calls: dropouts of this micro-batch that lie before.
    """

    def __init__(self, seed: int, place: Callable[[], tuple[int, int]], calls: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.place = place
        self._calls = calls
        self._last = place() if calls else None
        self._checkpointing: tuple[Any, Any] | None = None

    def __enter__(self) -> AlignedRandom:
        # Recomputation happens in backward, outside of this mode and perhaps in another thread. These two
        # are what torch.utils.checkpoint.checkpoint hands its function to; both get one that brings the
        # mode along, at the place where the first run began.
        module: Any = torch.utils.checkpoint
        reentrant, other = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
        self._checkpointing = reentrant, other
        module.CheckpointFunction = SimpleNamespace(
            apply=lambda function, *args: reentrant.apply(self._replaying(function, first=False), *args)
        )
        module._checkpoint_without_reentrant_generator = lambda function, *args, **kwargs: other(
            self._replaying(function, first=True), *args, **kwargs
        )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        module: Any = torch.utils.checkpoint
        assert self._checkpointing is not None
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = self._checkpointing

    def _replaying(self, function: Callable[..., Any], first: bool) -> Callable[..., Any]:
        """`function`, whose calls draw the masks that it would draw now; `first`: its first call already."""
        place, calls = self.place(), self._calls_here()
        replaying = first

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal replaying
            if not replaying:
                replaying = True
                return function(*args, **kwargs)
            with AlignedRandom(self.seed, lambda: place, calls):
                return function(*args, **kwargs)

        return run

    def _calls_here(self) -> int:
        """How many dropouts of this micro-batch lie before."""
        place = self.place()
        if place != self._last:
            self._last, self._calls = place, 0
        return self._calls

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
        call, (step, slot) = self._calls_here(), self.place()
        self._calls += 1
        words = random_words(input.numel(), self.seed, (call, slot, step), input.device)
        keep = (words >= round(p * 2.0**32)).view(input.shape)
        scale = 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
        result = input * (keep.to(input.dtype) * scale)
        return input.copy_(result) if inplace else result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUT:
            return self._dropout(*args, **kwargs)
        name = _REFUSED.get(func) or _hidden_dropout(func, args, kwargs)
        if name is not None:
            raise NotImplementedYetError(
                f"{name} inside an aligned forward pass",
                "use nn.Dropout, draw before the engine, or train without it",
            )
        return func(*args, **kwargs)
