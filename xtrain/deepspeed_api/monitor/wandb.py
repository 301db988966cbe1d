"""`deepspeed.monitor.wandb`."""

from xtrain.metrics.monitor.wandb import *  # noqa: F403
