"""Monitors: where the scalars of a run go while it trains (TensorBoard, CSV, Weights & Biases, Comet)."""
