"""DeepSpeed's `deepspeed.monitor.config`: the monitors' sections of a config that is a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.config import load_config
from xtrain.config.metrics import CometConfig, CsvConfig, TensorBoardConfig, WandbConfig
from xtrain.config.schema import Config

CSVConfig = CsvConfig
"""DeepSpeed's name."""

SECTIONS = ("tensorboard", "wandb", "csv_monitor", "comet")

__all__ = ["SECTIONS", "CSVConfig", "CometConfig", "DeepSpeedMonitorConfig", "TensorBoardConfig", "WandbConfig",
           "get_monitor_config"]  # fmt: skip


class DeepSpeedMonitorConfig:
    """The monitors' sections of a checked config; the defaults when none is given.

    Attributes: `tensorboard`, `wandb`, `csv_monitor`, `comet`; `enabled` when one of them is.
    """

    def __init__(self, values: Config | None = None) -> None:
        values = Config() if values is None else values
        self.tensorboard, self.wandb = values.tensorboard, values.wandb
        self.csv_monitor, self.comet = values.csv_monitor, values.comet
        self.enabled = any(getattr(self, name).enabled for name in SECTIONS)

    def __repr__(self) -> str:
        return ", ".join(repr(getattr(self, name)) for name in SECTIONS)


def get_monitor_config(param_dict: Mapping[str, Any]) -> DeepSpeedMonitorConfig:
    """The monitors' sections of a DeepSpeed config; its other keys are not read.

    Raises:
        ConfigError: a mistake in one of them.
    """
    return DeepSpeedMonitorConfig(
        load_config({name: param_dict[name] for name in SECTIONS if name in param_dict}).values
    )
