"""Optimizers: built from the config, or checked when the user brings one."""

from xtrain.optim.adam import Adam
from xtrain.optim.build import build_optimizer, check_elementwise

__all__ = ["Adam", "build_optimizer", "check_elementwise"]
