"""`deepspeed.monitor.tensorboard`."""

from xtrain.metrics.monitor.tensorboard import *  # noqa: F403
