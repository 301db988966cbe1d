"""Monitors: where the scalars of a run go while it trains (TensorBoard, CSV, Weights & Biases, Comet)."""

from xtrain.monitor.monitor import Monitor, MonitorMaster

__all__ = ["Monitor", "MonitorMaster"]
