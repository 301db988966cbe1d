"""`apex.optimizers`: the names and arguments of apex, over the operations of `amp_C`."""

from xtrain.shims.apex import refused
from xtrain.shims.apex.optimizers.fused_adagrad import FusedAdagrad
from xtrain.shims.apex.optimizers.fused_adam import FusedAdam
from xtrain.shims.apex.optimizers.fused_lamb import FusedLAMB
from xtrain.shims.apex.optimizers.fused_novograd import FusedNovoGrad
from xtrain.shims.apex.optimizers.fused_sgd import FusedSGD

FusedMixedPrecisionLamb = refused.refused_class("optimizers.FusedMixedPrecisionLamb")

__getattr__ = refused.attributes(__name__)

__all__ = ["FusedAdagrad", "FusedAdam", "FusedLAMB", "FusedMixedPrecisionLamb", "FusedNovoGrad", "FusedSGD"]
