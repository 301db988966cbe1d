"""Loss scaling for fp16 (Micikevicius et al., ICLR 2018), with DeepSpeed's window and hysteresis.

Source of the rules: https://www.deepspeed.ai/docs/config-json/#fp16-training-options and the behaviour
of deepspeed 0.19.8.
"""

from __future__ import annotations

from typing import Any

from xtrain.base.errors import TrainingError
from xtrain.config.schema import Fp16Config, TorchAutocastConfig


class LossScale:
    """A constant factor on the loss; 1 for fp32 and bf16."""

    dynamic = False
    can_fall = False
    """Whether an overflow may still make it smaller."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.cur_iter = 0
        """Steps seen, skipped ones included."""

    @property
    def needed(self) -> bool:
        """Whether losses must be multiplied at all."""
        return self.dynamic or self.value != 1.0

    def update(self, overflow: bool) -> None:
        """Learn from a step. A constant does not."""
        self.cur_iter += 1

    @property
    def cur_scale(self) -> float:
        """DeepSpeed's name of the value."""
        return self.value

    loss_scale = cur_scale

    @property
    def dynamic_loss_scale(self) -> bool:
        """DeepSpeed's name of `dynamic`."""
        return self.dynamic

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A constant scale is the config's, whatever the checkpoint says."""


class DynamicLossScale(LossScale):
    """Doubles after more than `window` steps without overflow; halves when no hysteresis is left.

    Args:
        initial: scale of the first step.
        window: steps without overflow before the one after which the scale doubles.
        hysteresis: overflows that are borne before the scale is halved.
        consecutive: refill the hysteresis after every good step, not only when the scale doubles.
        minimum: the scale never goes below it; an overflow there is an error.
        error_at_minimum: False bears overflows at the smallest scale, as DeepSpeed does in stage 0.
        like_grad_scaler: the scale doubles after the window's last good step, as in torch.amp.GradScaler, instead of
            after the one that follows.
    """

    dynamic = True

    def __init__(
        self,
        initial: float,
        window: int,
        hysteresis: int,
        consecutive: bool,
        minimum: float,
        error_at_minimum: bool = True,
        like_grad_scaler: bool = False,
    ) -> None:
        super().__init__(initial)
        self.error_at_minimum = error_at_minimum
        self._first = int(like_grad_scaler)
        self.window = window
        self.hysteresis = hysteresis
        self.consecutive = consecutive
        self.minimum = minimum
        self._left = hysteresis
        self._good = self._first

    @property
    def can_fall(self) -> bool:  # type: ignore[override]
        """Whether an overflow may still make it smaller."""
        return self.value > self.minimum

    @property
    def scale_window(self) -> int:
        """DeepSpeed's name of `window`."""
        return self.window

    @property
    def min_scale(self) -> float:
        """DeepSpeed's name of `minimum`."""
        return self.minimum

    min_loss_scale = min_scale

    @property
    def cur_hysteresis(self) -> int:
        """Overflows that are still borne before the scale is halved, that one included."""
        return self._left

    def update(self, overflow: bool) -> None:
        """Adapt to whether the gradients of the last step overflowed (on any rank).

        Raises:
            TrainingError: the gradients overflow at the smallest scale.
        """
        super().update(overflow)
        if overflow:
            self._good = self._first
            if self._left > 1:
                self._left -= 1
                return
            if self.value <= self.minimum and self.error_at_minimum:
                raise TrainingError(
                    f"gradients overflow at the smallest loss scale ({self.minimum:g}): the run has diverged; "
                    "go back to a checkpoint with a lower learning rate, or train in bf16"
                )
            self.value = max(self.value / 2, self.minimum)
            return
        if self.consecutive:
            self._left = self.hysteresis
        # As in DeepSpeed: `window` good steps lie before the one after which the scale doubles.
        if self._good > 0 and self._good % self.window == 0:
            self._left = self.hysteresis
            self.value *= 2
        self._good += 1

    def state_dict(self) -> dict[str, Any]:
        """Scale, hysteresis left, and good steps since the last overflow."""
        return {"value": self.value, "left": self._left, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; one that was written without a dynamic scale restores its value only."""
        self.value = state["value"]
        self._left = state.get("left", self.hysteresis)
        self._good = state.get("good", self._first)


def make_loss_scale(
    fp16: Fp16Config,
    autocast: TorchAutocastConfig | None = None,
    initial_power: int | None = None,
    stage: int = 1,
) -> LossScale:
    """The scale that the `fp16` section asks for, or autocast to fp16 (then that of torch.amp.GradScaler).

    Args:
        initial_power: the backend's default for `initial_scale_power`.
        stage: of ZeRO. In stage 0 DeepSpeed knows no hysteresis.
    """
    if not fp16.enabled:
        if autocast is not None and autocast.enabled and autocast.dtype in ("fp16", "float16"):
            return DynamicLossScale(
                initial=2.0**16,
                window=2000,
                hysteresis=1,
                consecutive=False,
                minimum=1.0,
                like_grad_scaler=True,
            )
        return LossScale()
    if fp16.loss_scale > 0:
        return LossScale(fp16.loss_scale)
    if initial_power is None or "initial_scale_power" in fp16.model_fields_set:
        initial_power = fp16.initial_scale_power
    return DynamicLossScale(
        initial=2.0**initial_power,
        window=fp16.loss_scale_window,
        hysteresis=fp16.hysteresis if stage else 1,
        consecutive=fp16.consecutive_hysteresis,
        minimum=fp16.min_loss_scale,
        error_at_minimum=stage > 0,
    )
