"""`deepspeed.monitor.csv_monitor`."""

from xtrain.metrics.monitor.csv_monitor import *  # noqa: F403
