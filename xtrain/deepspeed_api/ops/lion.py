"""DeepSpeed's Lion classes, as xtrain's one Lion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtrain.backends import registry
from xtrain.optim import Lion
from xtrain.optim.chunked import refuse_options


class FusedLion(Lion):
    """`deepspeed.ops.lion.FusedLion`; arguments as there.

    Args:
        set_grad_none: what `zero_grad` does when the script says nothing.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay)
        self.set_grad_none = set_grad_none
        self.chunk_size = registry.detect().zero.update_chunk

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Clear the gradients."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)


class DeepSpeedCPULion(FusedLion):
    """`deepspeed.ops.lion.DeepSpeedCPULion`; arguments as there. States are float32 always.

    Raises:
        NotImplementedYetError: states in another dtype.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse_options(fp32_optimizer_states=fp32_optimizer_states)
        super().__init__(model_params, lr, betas, weight_decay)
