"""Optimizers: built from the config, or checked when the user brings one."""

from xtrain.optim.adam import Adam
from xtrain.optim.build import build_optimizer, check_elementwise
from xtrain.optim.lion import Lion

__all__ = ["Adam", "Lion", "build_optimizer", "check_elementwise"]
