"""`amp.scale_loss`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from xtrain.shims.apex.amp._amp_state import _amp_state


@contextlib.contextmanager
def scale_loss(
    loss: torch.Tensor,
    optimizers: Any,
    loss_id: int = 0,
    model: Any = None,
    delay_unscale: bool = False,
    delay_overflow_check: bool = False,
) -> Iterator[torch.Tensor]:
    """`with amp.scale_loss(loss, optimizer) as scaled: scaled.backward()`.

    After it gradients are unscaled, in the parameters that the optimizer updates; one that is not finite makes the
    optimizer skip its next step and halves a dynamic scale.

    Args:
        loss: a number's tensor.
        optimizers: of the parameters that get gradients; one or a list.
        loss_id: which of the `num_losses` scalers.
        delay_unscale: gradients are left scaled, for further ones to be added to.
        delay_overflow_check: gradients are not looked at.

    Raises:
        RuntimeError: `amp.initialize` was not called.
    """
    options = _amp_state.opt_properties
    if options is None:
        raise RuntimeError(
            "amp.scale_loss: call model, optimizer = amp.initialize(model, optimizer, ...) before"
        )
    if not options.enabled:
        yield loss
        return
    scaler = _amp_state.loss_scalers[loss_id]
    scale = scaler.loss_scale()
    if not options.master_weights and not scaler.dynamic and scale == 1.0:
        yield loss.float()
        return
    stashes = [given._amp_stash for given in (optimizers if isinstance(optimizers, list) else [optimizers])]
    for stash in stashes:
        if not stash.params_have_scaled_gradients:
            stash.before_backward()
    yield loss.float() * scale
    if delay_unscale:
        for stash in stashes:
            stash.params_have_scaled_gradients = True
        return
    overflow = False
    for stash in stashes:
        overflow = stash.after_backward(scale) or overflow
        stash.params_have_scaled_gradients = False
    if not delay_overflow_check and scaler.update(overflow):
        _amp_state.says(
            f"Gradient overflow. Skipping step, loss scaler {loss_id} is now {scaler.loss_scale()}"
        )
        for stash in stashes:
            stash.skip = True
