"""`deepspeed.monitor.config`: the sections of the monitors as one object."""

from xtrain.config.instruments import CometConfig, CsvConfig, TensorBoardConfig, WandbConfig
from xtrain.metrics.monitor.config import CSVConfig, DeepSpeedMonitorConfig, get_monitor_config

__all__ = [
    "CSVConfig",
    "CometConfig",
    "CsvConfig",
    "DeepSpeedMonitorConfig",
    "TensorBoardConfig",
    "WandbConfig",
    "get_monitor_config",
]
