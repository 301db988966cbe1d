"""`deepspeed.runtime.lr_schedules`: see xtrain.schedulers."""

from xtrain.schedulers import LRRangeTest, OneCycle, WarmupCosineLR, WarmupDecayLR, WarmupLR

LR_RANGE_TEST = LRRangeTest.__name__
ONE_CYCLE = OneCycle.__name__
WARMUP_LR = WarmupLR.__name__
WARMUP_DECAY_LR = WarmupDecayLR.__name__
WARMUP_COSINE_LR = WarmupCosineLR.__name__
VALID_LR_SCHEDULES = [LR_RANGE_TEST, ONE_CYCLE, WARMUP_LR, WARMUP_DECAY_LR, WARMUP_COSINE_LR]
"""Values of the config key `scheduler.type`; Accelerate compares class names with them."""

__all__ = [
    "VALID_LR_SCHEDULES",
    "LRRangeTest",
    "OneCycle",
    "WarmupCosineLR",
    "WarmupDecayLR",
    "WarmupLR",
]
