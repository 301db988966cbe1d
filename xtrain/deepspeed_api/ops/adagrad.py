"""DeepSpeed's Adagrad class, as xtrain's one Adagrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtrain.backends import registry
from xtrain.optim import Adagrad
from xtrain.optim.chunked import refuse_options


class DeepSpeedCPUAdagrad(Adagrad):
    """`deepspeed.ops.adagrad.DeepSpeedCPUAdagrad`; arguments as there. States are float32 always.

    Raises:
        NotImplementedYetError: `amsgrad`, or states in another dtype.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        refuse_options(amsgrad, fp32_optimizer_states)
        super().__init__(model_params, lr, eps, weight_decay)
        self.chunk_size = registry.detect().zero.update_chunk
