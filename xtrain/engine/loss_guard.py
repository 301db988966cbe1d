"""What went wrong in a step, told alike on every rank: losses that are not finite, missing gradients.

Ranks that raise alone leave the others waiting in a collective. So a bad loss reaches every rank as a
gradient norm that is not finite, which costs nothing, and messages are put together only when something
is wrong. What to do about a skipped step (loss scale, counters) is the engine's affair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from xtrain import comm
from xtrain.base.errors import ConfigError, TrainingError
from xtrain.parallel import DataParallelGrid

_SHOWN = 4
"""Losses or names that a message lists at most."""


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


class LossGuard:
    """Keeps the losses of an accumulation window and counts skipped steps.

    Args:
        grid: the ranks that train together.
        limit: skipped steps in a row after which training is given up; None: never.
    """

    def __init__(self, grid: DataParallelGrid, limit: int | None) -> None:
        self.grid = grid
        self.limit = limit
        self._losses: list[torch.Tensor] = []
        self._in_a_row = 0

    def seed(self, loss: torch.Tensor, scaled: torch.Tensor) -> torch.Tensor:
        """The gradient that backward of `scaled` starts from: 1, or NaN when the loss is not finite.

        A loss can be infinite and its gradient finite (an overflowing constant, say); the NaN makes the
        step fail on every rank, without asking the device.
        """
        loss = loss.detach()
        self._losses.append(loss)
        return torch.where(loss.isfinite(), 1.0, math.nan).to(scaled.dtype)

    def clear(self) -> None:
        """A window has ended or was given up."""
        self._losses.clear()

    def describe(self) -> str:
        """Which losses of the window were not finite, on which rank; a collective."""
        mine = (
            torch.stack([loss.reshape(()).float() for loss in self._losses]).tolist() if self._losses else []
        )
        everyone: list[list[float]] = [[]] * self.grid.size
        comm.all_gather_object(everyone, mine, group=self.grid.group)
        bad = [
            f"the loss was {loss} on rank {rank} (micro-batch {index + 1} of {len(losses)})"
            for rank, losses in enumerate(everyone)
            for index, loss in enumerate(losses)
            if not math.isfinite(loss)
        ]
        if bad:
            return _listed(bad)
        known = [f"{losses[-1]:g} on rank {rank}" for rank, losses in enumerate(everyone) if losses]
        return f"the losses were finite ({_listed(known)})" if known else "the script ran backward by itself"

    def after_step(
        self, step: int, overflow: bool, skips: bool, norm: float | None, adapts: bool = False
    ) -> None:
        """Close a window; every rank calls it with the same arguments.

        Args:
            step: number of the step, from 1.
            overflow: its gradients were not finite, and the weights were left alone.
            skips: whether such steps may be skipped.
            adapts: the loss scale may fall further: the step does not count among those in a row.

        Raises:
            TrainingError: they may not, or there were too many in a row.
        """
        self._in_a_row = self._in_a_row + 1 if overflow and not adapts else 0
        many = self.limit is not None and self._in_a_row >= self.limit
        if not overflow or (skips and not many):
            self.clear()
            return
        why = self.describe()
        self.clear()
        shown = "the gradients are not finite" if norm is None else f"the gradient norm is {norm}"
        after = f" for {self._in_a_row} steps in a row" if skips else ""
        raise TrainingError(
            f"step {step}: {shown}{after}, and {why}; the weights are those of the last good step: look at the "
            "data of this step, lower the learning rate, or go back to a checkpoint"
        )


def check_unused(names: Sequence[str], grid: DataParallelGrid, device: torch.device) -> None:
    """Raise on every rank when any rank has parameters without a gradient; a collective of one number.

    Raises:
        ConfigError: names the parameters and the ranks.
    """
    count = torch.tensor([len(names)], dtype=torch.int32, device=device)
    if grid.size > 1:
        comm.all_reduce(count, comm.ReduceOp.MAX, group=grid.group)
    if grid.model.size > 1:
        comm.all_reduce(count, comm.ReduceOp.MAX, group=grid.model.group)
    if not count.item():
        return
    everyone: list[list[str]] = [[]] * grid.size
    comm.all_gather_object(everyone, list(names), group=grid.group)
    ranks: dict[str, list[str]] = {}
    for rank, missing in enumerate(everyone):
        for name in missing:
            ranks.setdefault(name, []).append(str(rank))
    told = [
        f"{name!r} on {'every rank' if len(where) == grid.size else 'rank ' + ', '.join(where)}"
        for name, where in ranks.items()
    ]
    here = _listed(told) if told else "some of another model-parallel rank, which names them"
    raise ConfigError(
        f"parameters without a gradient: {here}; use them in the loss, freeze them, or set "
        "zero_optimization.ignore_unused_parameters to true"
    )
