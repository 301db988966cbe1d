"""Curves that users already have, told apart by content: xtrain's records and those of other tools. No torch."""

from xtrain.align.sources.detect import read_curve

__all__ = ["read_curve"]
