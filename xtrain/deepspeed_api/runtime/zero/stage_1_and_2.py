"""`deepspeed.runtime.zero.stage_1_and_2`: the optimizer under DeepSpeed's name, and memory estimates."""

from xtrain.deepspeed_api.optimizer_classes import DeepSpeedZeroOptimizer
from xtrain.zero.estimate import (
    estimate_zero2_model_states_mem_needs,
    estimate_zero2_model_states_mem_needs_all_cold,
    estimate_zero2_model_states_mem_needs_all_live,
)

__all__ = [
    "DeepSpeedZeroOptimizer",
    "estimate_zero2_model_states_mem_needs",
    "estimate_zero2_model_states_mem_needs_all_cold",
    "estimate_zero2_model_states_mem_needs_all_live",
]
