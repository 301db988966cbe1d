"""Scalars in TensorBoard event files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xtrain.metrics.monitor.writer import Event, Monitor, job_folder, require


class TensorBoardMonitor(Monitor):
    """Writes with torch's SummaryWriter, which is in `summary_writer` for the script's own use."""

    def __init__(self, tensorboard_config: Any) -> None:
        super().__init__(tensorboard_config)
        require("tensorboard", "tensorboard")
        self.output_path, self.job_name = tensorboard_config.output_path, tensorboard_config.job_name
        from torch.utils.tensorboard import SummaryWriter

        folder = job_folder(self.output_path, self.job_name)
        self.summary_writer: Any = SummaryWriter(log_dir=str(folder))

    def write_events(self, event_list: Sequence[Event], flush: bool = True) -> None:
        for tag, value, step in event_list:
            self.summary_writer.add_scalar(tag, value, step)
        if flush:
            self.flush()

    def flush(self) -> None:
        """Put everything written so far on disk."""
        self.summary_writer.flush()

    def close(self) -> None:
        super().close()
        self.summary_writer.close()
