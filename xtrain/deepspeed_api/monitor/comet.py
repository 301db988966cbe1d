"""`deepspeed.monitor.comet`."""

from xtrain.metrics.monitor.comet import (
    CometMonitor,
    EventsLogScheduler,
)

__all__ = [
    "CometMonitor",
    "EventsLogScheduler",
]
