"""`deepspeed.runtime.zero.offload_config`: what offload_states() is told, and the config's offload sections."""

from xtrain.runtime.zero.config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from xtrain.zero.offload import OffloadDeviceEnum
from xtrain.zero.state_memory import OffloadStateTypeEnum

__all__ = [
    "DeepSpeedZeroOffloadOptimizerConfig",
    "DeepSpeedZeroOffloadParamConfig",
    "OffloadDeviceEnum",
    "OffloadStateTypeEnum",
]
