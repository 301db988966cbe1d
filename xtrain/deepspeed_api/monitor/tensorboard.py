"""`deepspeed.monitor.tensorboard`."""

from xtrain.metrics.monitor.tensorboard import (
    TensorBoardMonitor,
)

__all__ = [
    "TensorBoardMonitor",
]
