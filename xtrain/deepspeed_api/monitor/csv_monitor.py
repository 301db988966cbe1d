"""`deepspeed.monitor.csv_monitor`."""

from xtrain.metrics.monitor.csv_monitor import (
    CsvMonitor,
    csvMonitor,
)

__all__ = [
    "CsvMonitor",
    "csvMonitor",
]
