"""Reading and checking the DeepSpeed configuration. Imports no torch: the launcher uses it too."""

from xtrain.config.batch import BatchSizes, solve_batch_sizes
from xtrain.config.load import XtrainConfig, load_config
from xtrain.config.schema import Config

__all__ = ["BatchSizes", "Config", "XtrainConfig", "load_config", "solve_batch_sizes"]
