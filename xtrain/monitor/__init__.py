"""Monitors: where the scalars of a run go while it trains (TensorBoard, CSV, Weights & Biases, Comet)."""

from xtrain.compat import packages
from xtrain.monitor.monitor import Monitor, MonitorMaster

__all__ = ["Monitor", "MonitorMaster"]

__getattr__ = packages.attributes(__name__)
