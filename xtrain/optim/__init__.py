"""Optimizers: built from the config, or checked when the user brings one."""

from xtrain.optim.adagrad import Adagrad
from xtrain.optim.adam import Adam
from xtrain.optim.build import (
    UnsuitableOptimizerError,
    build_optimizer,
    check_elementwise,
    check_for_offload,
    check_fresh,
)
from xtrain.optim.lamb import Lamb
from xtrain.optim.lion import Lion
from xtrain.optim.muon import Muon

__all__ = [
    "Adagrad",
    "Adam",
    "Lamb",
    "Lion",
    "Muon",
    "UnsuitableOptimizerError",
    "build_optimizer",
    "check_elementwise",
    "check_for_offload",
    "check_fresh",
]
