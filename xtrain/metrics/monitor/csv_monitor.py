"""Scalars in CSV files: one for each tag, `Train/Samples/lr` in `Train_Samples_lr.csv` with columns step and lr."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from xtrain.metrics.monitor.writer import Event, Monitor, job_folder


class CsvMonitor(Monitor):
    """Appends to the files, so that a resumed run continues them."""

    def __init__(self, csv_config: Any) -> None:
        super().__init__(csv_config)
        self.output_path, self.job_name = csv_config.output_path, csv_config.job_name
        self.log_dir = str(job_folder(self.output_path, self.job_name))

    def write_events(self, event_list: Sequence[Event]) -> None:
        lines: dict[str, list[tuple[int, Any]]] = defaultdict(list)
        for tag, value, step in event_list:
            lines[tag].append((step, value))
        for tag, rows in lines.items():
            name = tag.replace("/", "_").replace(" ", "_")
            with open(f"{self.log_dir}/{name}.csv", "a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if file.tell() == 0:
                    writer.writerow(["step", tag.rpartition("/")[2]])
                writer.writerows(rows)


csvMonitor = CsvMonitor
"""DeepSpeed's name."""
