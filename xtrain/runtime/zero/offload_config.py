"""`deepspeed.runtime.zero.offload_config`: what offload_states() and reload_states() are told."""

from xtrain.zero.offload import OffloadDeviceEnum, OffloadStateTypeEnum

__all__ = ["OffloadDeviceEnum", "OffloadStateTypeEnum"]
