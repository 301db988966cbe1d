"""`deepspeed.utils.timer`: timers by name, and samples per second."""

from xtrain.metrics.timer import *  # noqa: F403
