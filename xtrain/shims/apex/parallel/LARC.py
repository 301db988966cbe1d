"""`apex.parallel.LARC`: a learning rate for each tensor, from the ratio of its norm to its gradient's."""

from __future__ import annotations

from typing import Any

import torch


class LARC:
    """Wraps an optimizer; changes gradients before its step (https://arxiv.org/abs/1708.03888).

    Args:
        optimizer: any torch optimizer.
        trust_coefficient: of the local rate.
        clip: the local rate is at most the optimizer's; else it multiplies it.
        eps: added to the denominator.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trust_coefficient: float = 0.02,
        clip: bool = True,
        eps: float = 1e-8,
    ) -> None:
        self.optim = optimizer
        self.trust_coefficient = trust_coefficient
        self.clip = clip
        self.eps = eps

    def __getattr__(self, name: str) -> Any:
        if name == "optim":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.optim, name)

    def __repr__(self) -> str:
        return repr(self.optim)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optim.param_groups = value

    @torch.no_grad()
    def _scale(self, group: dict[str, Any], decay: float) -> None:
        for param in group["params"]:
            if param.grad is None:
                continue
            size, slope = torch.linalg.vector_norm(param), torch.linalg.vector_norm(param.grad)
            if size == 0 or slope == 0:
                continue
            rate = self.trust_coefficient * size / (slope + size * decay + self.eps)
            if self.clip:
                rate = (rate / group["lr"]).clamp_max(1)
            param.grad += decay * param
            param.grad *= rate

    def step(self) -> None:
        """Scale the gradients, with the decay in them, and take the optimizer's step without a decay."""
        decays = [group.get("weight_decay", 0) for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = 0
            self._scale(group, decay)
        self.optim.step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
