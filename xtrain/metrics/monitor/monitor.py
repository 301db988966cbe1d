"""All monitors that a config asks for, behind one `write_events`. Each one's package is imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from xtrain import comm
from xtrain.base.errors import ConfigError
from xtrain.base.log import logger
from xtrain.comm.rank_agreement import together
from xtrain.metrics.monitor.writer import Event, Monitor

__all__ = ["Event", "Monitor", "MonitorMaster"]

_CLASSES = {
    # section: attribute, module, class
    "tensorboard": ("tb_monitor", "tensorboard", "TensorBoardMonitor"),
    "wandb": ("wandb_monitor", "wandb", "WandbMonitor"),
    "csv_monitor": ("csv_monitor", "csv_monitor", "CsvMonitor"),
    "comet": ("comet_monitor", "comet", "CometMonitor"),
}


class MonitorMaster:
    """Hands events to every enabled monitor; only rank 0 writes.

    Args:
        monitor_config: has the sections `tensorboard`, `wandb`, `csv_monitor` and `comet`, and `enabled`.

    Attributes:
        enabled: whether any monitor is, the same on every rank.
        tb_monitor, wandb_monitor, csv_monitor, comet_monitor: on rank 0, when enabled; else None.

    Raises:
        ConfigError: on every rank, when a monitor cannot be started: its package is missing, say.
    """

    def __init__(self, monitor_config: Any) -> None:
        self.monitor_config = monitor_config
        self.enabled: bool = monitor_config.enabled
        self.tb_monitor: Any = None
        self.wandb_monitor: Any = None
        self.csv_monitor: Any = None
        self.comet_monitor: Any = None
        self._failed: list[Monitor] = []
        if not self.enabled:
            return
        if comm.is_initialized():
            together(self._start, "starting the monitors", ConfigError)
        else:
            self._start()

    def _start(self) -> None:
        for section, (attribute, module, name) in _CLASSES.items():
            config = getattr(self.monitor_config, section)
            if config.enabled and comm.get_rank() == 0:
                cls = getattr(importlib.import_module(f"xtrain.metrics.monitor.{module}"), name)
                setattr(self, attribute, cls(config))

    @property
    def monitors(self) -> list[Monitor]:
        """Those that are running on this rank."""
        found = [getattr(self, attribute) for attribute, _, _ in _CLASSES.values()]
        return [monitor for monitor in found if monitor is not None]

    def write_events(self, event_list: Sequence[Event]) -> None:
        """Write (tag, value, step) to every monitor on rank 0; nothing elsewhere.

        Args:
            event_list: values are numbers or tensors of one element.
        """
        if not (monitors := self.monitors):
            return
        plain = [
            (tag, value.item() if isinstance(value, torch.Tensor) else value, step)
            for tag, value, step in event_list
        ]
        for monitor in monitors:
            try:
                monitor.write_events(plain)
            except OSError as error:  # a full disk: training goes on, and so do the other ranks
                if monitor not in self._failed:
                    self._failed.append(monitor)
                    place = getattr(monitor, "log_dir", None) or error.filename or "its files"
                    logger.warning(
                        "%s cannot write to %s (%s): training goes on, scalars are missing there from step %s on, and "
                        "are written again when that is possible",
                        type(monitor).__name__,
                        place,
                        error.strerror or error,
                        plain[0][2],
                    )

    def close(self) -> None:
        """Finish every monitor."""
        for monitor in self.monitors:
            monitor.close()
        for attribute, _, _ in _CLASSES.values():
            setattr(self, attribute, None)
