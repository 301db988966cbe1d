"""`deepspeed.monitor.comet`."""

from xtrain.metrics.monitor.comet import *  # noqa: F403
