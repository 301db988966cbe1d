"""`deepspeed.monitor.monitor`: where scalars go."""

from xtrain.metrics.monitor.monitor import (
    Monitor,
    MonitorMaster,
)

__all__ = [
    "Monitor",
    "MonitorMaster",
]
