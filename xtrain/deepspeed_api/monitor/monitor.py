"""`deepspeed.monitor.monitor`: where scalars go."""

from xtrain.metrics.monitor.monitor import *  # noqa: F403
