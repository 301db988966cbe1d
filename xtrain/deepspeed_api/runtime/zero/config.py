"""`deepspeed.runtime.zero.config`: the section `zero_optimization` as an object of its own."""

from __future__ import annotations

import enum

from pydantic import model_validator

from xtrain.config.schema import OffloadConfig, ZeroConfig

ZERO_OPTIMIZATION = "zero_optimization"
"""The section's key."""
DeepSpeedZeroOffloadParamConfig = DeepSpeedZeroOffloadOptimizerConfig = OffloadConfig


class ZeroStageEnum(int, enum.Enum):
    """What is divided over the data-parallel ranks."""

    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3
    max_stage = 3  # noqa: PIE796 - DeepSpeed's other name of it


class DeepSpeedZeroConfig(ZeroConfig):
    """The section by itself: without the checks that need the stage to be the one that is meant.

    `overlap_comm` reads as DeepSpeed's default where it was left out: true in stage 3 only.
    """

    @model_validator(mode="after")
    def _check_offload_stage(self) -> DeepSpeedZeroConfig:
        """Replaces the check of the base class."""
        return self

    @model_validator(mode="after")
    def _overlap_default(self) -> DeepSpeedZeroConfig:
        if self.overlap_comm is None:
            self.overlap_comm = self.stage == ZeroStageEnum.weights
        return self


__all__ = [
    "DeepSpeedZeroConfig",
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "ZeroStageEnum",
]
