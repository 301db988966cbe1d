"""`apex.fp16_utils`: networks in 16 bits with float32 masters, by hand."""

from xtrain.shims.apex import refused
from xtrain.shims.apex.fp16_utils.fp16util import (
    BN_convert_float,
    FP16Model,
    clip_grad_norm,
    convert_module,
    convert_network,
    master_params_to_model_params,
    model_grads_to_master_grads,
    network_to_half,
    prep_param_lists,
    to_python_float,
    tofp16,
)
from xtrain.shims.apex.fp16_utils.loss_scaler import DynamicLossScaler, LossScaler

FP16_Optimizer = refused.refused_class("fp16_utils.FP16_Optimizer")

__all__ = [
    "BN_convert_float",
    "DynamicLossScaler",
    "FP16Model",
    "FP16_Optimizer",
    "LossScaler",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]
