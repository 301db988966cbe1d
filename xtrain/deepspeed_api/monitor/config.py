"""`deepspeed.monitor.config`: the sections of the monitors as one object."""

from xtrain.config.metrics import CometConfig, CsvConfig, TensorBoardConfig, WandbConfig  # noqa: F401
from xtrain.metrics.monitor.config import *  # noqa: F403
