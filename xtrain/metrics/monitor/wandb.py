"""Scalars to Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtrain.metrics.monitor.writer import Event, Monitor, require


class WandbMonitor(Monitor):
    """Starts a run, or uses the one that the script has started."""

    def __init__(self, wandb_config: Any) -> None:
        super().__init__(wandb_config)
        self._wandb = require("wandb", "wandb")
        self.group, self.team, self.project = wandb_config.group, wandb_config.team, wandb_config.project
        self._own = self._wandb.run is None
        self._wandb.init(project=self.project, group=self.group, entity=self.team)

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> Any:
        """`wandb.log`."""
        return self._wandb.log(data, step=step, commit=commit)

    def write_events(self, event_list: Sequence[Event]) -> None:
        for tag, value, step in event_list:
            self.log({tag: value}, step=step)

    def close(self) -> None:
        super().close()
        if self._own:
            self._wandb.finish()
