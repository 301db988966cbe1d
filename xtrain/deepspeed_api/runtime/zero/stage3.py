"""`deepspeed.runtime.zero.stage3`: the optimizer under DeepSpeed's name, and memory estimates."""

from xtrain.deepspeed_api.optimizer_classes import DeepSpeedZeroOptimizer_Stage3
from xtrain.zero.estimate import (
    estimate_zero3_model_states_mem_needs,
    estimate_zero3_model_states_mem_needs_all_cold,
    estimate_zero3_model_states_mem_needs_all_live,
)

__all__ = [
    "DeepSpeedZeroOptimizer_Stage3",
    "estimate_zero3_model_states_mem_needs",
    "estimate_zero3_model_states_mem_needs_all_cold",
    "estimate_zero3_model_states_mem_needs_all_live",
]
