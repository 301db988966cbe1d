"""`deepspeed.monitor.wandb`."""

from xtrain.metrics.monitor.wandb import (
    WandbMonitor,
)

__all__ = [
    "WandbMonitor",
]
