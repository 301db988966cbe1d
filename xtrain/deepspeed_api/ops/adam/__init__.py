"""DeepSpeed's Adam classes, as xtrain's one Adam: no kernel is compiled, every backend computes the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtrain.backends import registry
from xtrain.optim import Adam
from xtrain.optim.chunked import refuse_options


class FusedAdam(Adam):
    """`deepspeed.ops.adam.FusedAdam`: AdamW unless `adam_w_mode` is False; arguments as there.

    Raises:
        NotImplementedYetError: `amsgrad`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        refuse_options(amsgrad)
        super().__init__(params, lr, betas, eps, weight_decay, bias_correction, adam_w_mode)
        self.chunk_size = registry.detect().zero.update_chunk


class DeepSpeedCPUAdam(FusedAdam):
    """`deepspeed.ops.adam.DeepSpeedCPUAdam`; arguments as there. States are float32 always.

    Raises:
        NotImplementedYetError: `amsgrad`, or states in another dtype.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse_options(fp32_optimizer_states=fp32_optimizer_states)
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)
