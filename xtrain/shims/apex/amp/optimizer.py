"""What `amp.initialize` adds to an optimizer: float32 masters, gradients that are unscaled, steps that are skipped."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch


class Stash:
    """The extra state of one optimizer, as its `_amp_stash`.

    Attributes:
        pairs: (parameter of the model, what the optimizer updates); the same tensor where there is no master.
        params_have_scaled_gradients: after `scale_loss(..., delay_unscale=True)`.
        skip: the next step is to be skipped.
    """

    def __init__(self, optimizer: Any, master_weights: bool) -> None:
        self.params_have_scaled_gradients = False
        self.skip = False
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.kept: list[torch.Tensor | None] = []
        for group in optimizer.param_groups:
            for place, param in enumerate(group["params"]):
                master = param
                if master_weights and param.dtype == torch.float16:
                    master = param.detach().clone().float().requires_grad_(param.requires_grad)
                    group["params"][place] = master
                    if param in optimizer.state:
                        optimizer.state[master] = optimizer.state.pop(param)
                self.pairs.append((param, master))

    @staticmethod
    def attach(optimizer: Any, master_weights: bool) -> None:
        """Give the optimizer a stash, and let its `step` and `zero_grad` heed it."""
        stash = optimizer._amp_stash = Stash(optimizer, master_weights)
        # States that there are already get the masters' dtype, and what a subclass keeps by parameter follows.
        optimizer.load_state_dict(optimizer.state_dict())
        step, zero_grad = optimizer.step, optimizer.zero_grad

        def heedful_step(
            self: Any, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            if closure is not None:
                raise RuntimeError("apex.amp does not support closures: call step() without one")
            if stash.skip:
                stash.skip = False
                stash.drop_master_gradients()
                return None
            result = step(*args, **kwargs)
            stash.copy_to_model()
            return result

        def zero_all(self: Any, *args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            for param, master in stash.pairs:
                if master is not param:
                    param.grad = None

        # Methods, as torch's schedulers expect, which wrap them once more.
        optimizer.step = MethodType(heedful_step, optimizer)
        optimizer.zero_grad = MethodType(zero_all, optimizer)

    def drop_master_gradients(self) -> None:
        """Remove the masters' gradients, which `model.zero_grad()` does not know."""
        for param, master in self.pairs:
            if master is not param:
                master.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """The masters' values, rounded."""
        for param, master in self.pairs:
            if master is not param:
                param.copy_(master)

    def before_backward(self) -> None:
        """Put the gradients that are there aside: those to come are scaled."""
        self.kept = [master.grad for _, master in self.pairs]
        for param, _ in self.pairs:
            param.grad = None

    @torch.no_grad()
    def after_backward(self, scale: float) -> bool:
        """Unscale the new gradients and add them to those put aside; returns whether one is not finite."""
        found = []
        for (param, master), kept in zip(self.pairs, self.kept or [None] * len(self.pairs), strict=True):
            if param.grad is None:
                master.grad = kept
                continue
            found.append(torch.isfinite(param.grad).all())
            grad = param.grad.to(master.dtype) / scale
            if master is not param:
                param.grad = None
            master.grad = grad if kept is None else kept + grad
        self.kept = []
        return bool(found) and not bool(torch.stack(found).all())
