"""Scalars to Comet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtrain.base.errors import ConfigError
from xtrain.metrics.monitor.writer import Event, Monitor, require


class EventsLogScheduler:
    """Lets a tag through at its first value, and then whenever `samples_log_interval` samples have gone by."""

    def __init__(self, samples_log_interval: int) -> None:
        self._interval = samples_log_interval
        self._last: dict[str, int] = {}

    def needs_logging(self, name: str, current_sample: int) -> bool:
        """Whether to submit this value of `name`; it is then taken as submitted."""
        due = name not in self._last or current_sample - self._last[name] >= self._interval
        if due:
            self._last[name] = current_sample
        return due


class CometMonitor(Monitor):
    """Starts an experiment, which is in `experiment` for the script's own use."""

    def __init__(self, comet_config: Any) -> None:
        super().__init__(comet_config)
        comet_ml = require("comet_ml", "comet", "comet_ml>=3.41.0")
        if not hasattr(comet_ml, "start"):
            raise ConfigError(
                f"config key 'comet.enabled' is true, but comet_ml {comet_ml.__version__} has no start(): "
                "pip install 'comet_ml>=3.41.0', or set the key to false"
            )
        key = comet_config.api_key
        self.experiment: Any = comet_ml.start(
            api_key=None if key is None else key.get_secret_value(),
            project=comet_config.project,
            workspace=comet_config.workspace,
            experiment_key=comet_config.experiment_key,
            mode=comet_config.mode,
            online=comet_config.online,
        )
        if comet_config.experiment_name is not None:
            self.experiment.set_name(comet_config.experiment_name)
        self.samples_log_interval = comet_config.samples_log_interval
        self._scheduler = EventsLogScheduler(comet_config.samples_log_interval)

    def write_events(self, event_list: Sequence[Event]) -> None:
        for tag, value, step in event_list:
            if self._scheduler.needs_logging(tag, step):
                self.experiment.log_metric(tag, value, step=step)

    def close(self) -> None:
        super().close()
        self.experiment.end()
