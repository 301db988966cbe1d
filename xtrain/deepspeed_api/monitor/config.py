"""`deepspeed.monitor.config`: the sections of the monitors as one object."""

from xtrain.metrics.monitor.config import (
    SECTIONS,
    CSVConfig,
    DeepSpeedMonitorConfig,
    get_monitor_config,
)

__all__ = [
    "SECTIONS",
    "CSVConfig",
    "DeepSpeedMonitorConfig",
    "get_monitor_config",
]
