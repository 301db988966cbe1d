"""The loss scale of `apex.amp`."""

from __future__ import annotations


class LossScaler:
    """A factor for the loss: fixed, or halved at an overflow and doubled after 2000 steps without one.

    Attributes:
        dynamic: whether it follows overflows.
    """

    def __init__(
        self,
        loss_scale: float | str,
        init_scale: float = 2.0**16,
        scale_factor: float = 2.0,
        scale_window: int = 2000,
        min_loss_scale: float | None = None,
        max_loss_scale: float = 2.0**24,
    ) -> None:
        self.dynamic = loss_scale == "dynamic"
        self._loss_scale = min(max_loss_scale, init_scale) if self.dynamic else float(loss_scale)
        self._factor = scale_factor
        self._scale_seq_len = scale_window
        self._min_loss_scale = min_loss_scale
        self._max_loss_scale = max_loss_scale
        self._unskipped = 0

    def loss_scale(self) -> float:
        """The factor."""
        return self._loss_scale

    def update(self, overflow: bool) -> bool:
        """The factor for the next step; returns whether this one must be skipped."""
        skip = overflow and self.dynamic
        if skip:
            self._loss_scale = max(self._min_loss_scale or 0.0, self._loss_scale / self._factor)
            self._unskipped = 0
        else:
            self._unskipped += 1
        if self.dynamic and self._unskipped == self._scale_seq_len:
            self._loss_scale = min(self._max_loss_scale, self._loss_scale * self._factor)
            self._unskipped = 0
        return skip
