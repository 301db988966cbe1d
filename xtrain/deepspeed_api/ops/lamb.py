"""DeepSpeed's Lamb class, as xtrain's one Lamb: no kernel is compiled, every backend computes the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.optim import Lamb
from xtrain.optim.chunked import refuse_options


class FusedLamb(Lamb):
    """`deepspeed.ops.lamb.FusedLamb`; arguments as there.

    Raises:
        ConfigError: `max_grad_norm`, which is the engine's affair.
        NotImplementedYetError: `amsgrad`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        refuse_options(amsgrad)
        if max_grad_norm:
            raise ConfigError(
                "max_grad_norm is not an optimizer option: set 'gradient_clipping' in the config"
            )
        super().__init__(
            params, lr, bias_correction, betas, eps, eps_inside_sqrt, weight_decay, max_coeff, min_coeff
        )
