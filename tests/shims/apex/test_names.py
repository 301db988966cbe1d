"""What scripts import from apex: there, or refused by name with what to use instead."""

from __future__ import annotations

import importlib

import pytest

from xtrain.base.errors import NotImplementedYetError
from xtrain.shims import apex
from xtrain.shims.apex.transformer import AttnMaskType, utils
from xtrain.shims.apex_table import REFUSED

THERE = {
    "": "amp fp16_utils multi_tensor_apply normalization optimizers parallel",
    "optimizers": "FusedAdam FusedAdagrad FusedLAMB FusedNovoGrad FusedSGD",
    "normalization": "FusedLayerNorm FusedRMSNorm MixedFusedLayerNorm MixedFusedRMSNorm",
    "normalization.fused_layer_norm": "FusedLayerNormAffineFunction fused_rms_norm_affine",
    "multi_tensor_apply": "multi_tensor_applier MultiTensorApply",
    "parallel": "DistributedDataParallel SyncBatchNorm convert_syncbn_model Reducer LARC ReduceOp",
    "parallel.LARC": "LARC",
    "amp": "initialize scale_loss master_params state_dict load_state_dict float_function",
    "amp._amp_state": "_amp_state master_params",
    "fp16_utils": "network_to_half prep_param_lists FP16_Optimizer",
    "contrib.xentropy": "SoftmaxCrossEntropyLoss",
    "contrib.clip_grad": "clip_grad_norm_",
    "contrib.layer_norm.layer_norm": "FastLayerNormFN",
    "transformer.enums": "AttnMaskType ModelType",
    "transformer.utils": "divide ensure_divisibility",
    "mlp": "MLP",
    "fused_dense": "FusedDense FusedDenseGeluDense",
}


@pytest.mark.parametrize("package", THERE)
def test_there(package):
    module = importlib.import_module(f"xtrain.shims.apex.{package}".rstrip("."))
    assert all(hasattr(module, name) for name in THERE[package].split())


@pytest.mark.parametrize("path", REFUSED)
def test_refused_by_name(path):
    package, _, name = path.rpartition(".")
    holder = importlib.import_module(f"xtrain.shims.apex.{package}".rstrip("."))
    if hasattr(holder, name):  # a class that refuses when it is made
        with pytest.raises(NotImplementedYetError, match=REFUSED[path][1].split("(")[0][:20]):
            getattr(holder, name)()
        return
    with pytest.raises(ImportError, match=f"^apex.{path} "):
        importlib.import_module(f"xtrain.shims.apex.{path}")
    with pytest.raises(ImportError, match=f"^apex.{path}.* is not there yet in xtrain: "):
        importlib.import_module(f"xtrain.shims.apex.{path}.inner")
    with pytest.raises(AttributeError, match=f"^apex.{path} "):
        getattr(holder, name)


def test_what_apex_never_had():
    with pytest.raises(AttributeError, match="module 'apex' has no attribute 'nothing'"):
        apex.nothing  # noqa: B018
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("xtrain.shims.apex.nothing")


def test_enums_and_division():
    assert AttnMaskType.causal.value == 2
    assert utils.divide(6, 3) == 2
    with pytest.raises(AssertionError, match="not divisible"):
        utils.divide(7, 3)
