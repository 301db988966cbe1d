"""What `amp.initialize` has set up in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from xtrain.shims.apex.amp.scaler import LossScaler


@dataclass
class Properties:
    """The options that are in force; apex documents them.

    Attributes:
        enabled: False: everything is left as it is.
        opt_level: O0 to O3.
        cast_model_type: the dtype of the model's weights; None: as they are.
        patch_torch_functions: the forward pass runs under autocast to float16.
        keep_batchnorm_fp32: batch norms stay float32 when the model is cast.
        master_weights: the optimizer updates float32 copies.
        loss_scale: a number, or "dynamic".
    """

    enabled: bool = False
    opt_level: str | None = None
    cast_model_type: torch.dtype | None = None
    patch_torch_functions: bool = False
    keep_batchnorm_fp32: bool | None = None
    master_weights: bool | None = None
    loss_scale: float | str = 1.0


@dataclass
class AmpState:
    """The state; scripts read the scalers from it.

    Attributes:
        opt_properties: None before `initialize`.
        loss_scalers: one for each loss.
        verbosity: 0 prints nothing.
        casting: False within `disable_casts`.
    """

    opt_properties: Properties | None = None
    loss_scalers: list[LossScaler] = field(default_factory=list)
    verbosity: int = 1
    casting: bool = True

    def says(self, text: str) -> None:
        """Print on rank 0, unless verbosity is 0."""
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.verbosity > 0 and not (ready and torch.distributed.get_rank() > 0):
            print(text)


_amp_state = AmpState()


def master_params(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """The parameters that the optimizer updates: float32 copies in O2."""
    for group in optimizer.param_groups:
        yield from group["params"]
