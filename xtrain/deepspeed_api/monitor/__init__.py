"""Monitors: where the scalars of a run go while it trains (TensorBoard, CSV, Weights & Biases, Comet)."""

from xtrain.deepspeed_api.compat import packages
from xtrain.metrics.monitor.monitor import Monitor, MonitorMaster

__all__ = ["Monitor", "MonitorMaster"]

__getattr__ = packages.attributes(__name__)
