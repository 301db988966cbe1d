"""From the config's `optimizer` section to an optimizer object."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from xtrain.base.errors import ConfigError, NotImplementedYetError, unknown_name
from xtrain.base.log import log_dist
from xtrain.config.arguments import check_value, construct
from xtrain.config.schema import OptimizerConfig
from xtrain.optim.adam import Adam
from xtrain.optim.chunked import ChunkedOptimizer
from xtrain.optim.lamb import Lamb
from xtrain.optim.lion import Lion
from xtrain.optim.muon import muon_from_config, tag_parameters


class UnsuitableOptimizerError(ConfigError):
    """An optimizer cannot be used as the config wants it to be."""


_NOT_YET = {"onebitadam", "onebitlamb", "zerooneadam", "muadam", "muadamw", "musgd"}
_TYPES = ("Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", "SGD")

# PyTorch's optimizers whose update of an element depends on that element alone, so that slices can be
# updated apart.
_ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)


def _adam(params: dict[str, Any], kind: str) -> tuple[Any, dict[str, Any]]:
    """Class and arguments for type Adam or AdamW: Adam means AdamW unless `"adam_w_mode": false`."""
    for flag in ("adam_w_mode", "torch_adam"):
        check_value(params.get(flag, False), bool, f"optimizer.params.{flag}")
    decoupled = bool(params.pop("adam_w_mode", True)) or kind == "adamw"
    if params.pop("torch_adam", False):
        return (torch.optim.AdamW if decoupled else torch.optim.Adam), params
    return Adam, {**params, "adam_w_mode": decoupled}


def build_optimizer(
    config: OptimizerConfig,
    param_groups: list[dict[str, Any]],
    chunk_size: int | None = None,
    names: Mapping[Any, str] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer that the config names, over `param_groups`.

    As in DeepSpeed, type Adam means AdamW unless `"adam_w_mode": false`, `"torch_adam": true` takes
    PyTorch's own class, and any class of torch.optim can be named.

    Args:
        chunk_size: elements that xtrain's own optimizers update at a time.
        names: of the model's parameters, by which Muon leaves embeddings to Adam.

    Raises:
        ConfigError: unknown type, unknown entry in `params`, or a value out of range.
        NotImplementedYetError: a type that DeepSpeed has and xtrain has not yet.
    """
    kind, params = config.type.lower(), dict(config.params)
    if "max_grad_norm" in params:
        raise ConfigError(
            "config key 'optimizer.params.max_grad_norm' is not an optimizer option: use 'gradient_clipping'"
        )
    if kind in _NOT_YET:
        raise NotImplementedYetError(
            f"optimizer type {config.type!r}",
            f"use {', '.join(_TYPES)}, or pass an optimizer object to initialize()",
        )
    if params.get("amsgrad") is False:
        del params["amsgrad"]
    factory: Any
    if kind in ("adam", "adamw"):
        factory, params = _adam(params, kind)
    elif kind == "muon":
        tag_parameters(names or {})
        factory = muon_from_config
    else:
        own = {"lamb": Lamb, "lion": Lion, "adagrad": torch.optim.Adagrad, "sgd": torch.optim.SGD}
        factory = own.get(kind) or getattr(torch.optim, config.type, None)
    if kind != "muon" and not (isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer)):
        raise ConfigError(f"config key 'optimizer.type': {unknown_name('optimizer', config.type, _TYPES)}")
    optimizer: torch.optim.Optimizer = construct(factory, param_groups, params, "optimizer.params")
    if isinstance(optimizer, ChunkedOptimizer):
        optimizer.chunk_size = chunk_size
    return optimizer


def check_fresh(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a user's optimizer whose states would be lost, because it is given other tensors to update.

    Raises:
        ConfigError: it has taken steps already.
    """
    if any(float(state.get("step", 1)) > 0 for state in optimizer.state.values()):
        raise ConfigError(
            f"the optimizer {type(optimizer).__name__} has taken steps already: pass a fresh one to initialize() "
            "and restore its state with load_checkpoint()"
        )


def check_for_offload(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a script's optimizer where the config insists on xtrain's own for offloaded states.

    Raises:
        UnsuitableOptimizerError: it is not one of xtrain.ops or xtrain.optim.
    """
    if not isinstance(optimizer, ChunkedOptimizer):
        raise UnsuitableOptimizerError(
            f"the config has zero_force_ds_cpu_optimizer: true and offload_optimizer, and the optimizer is "
            f"{type(optimizer).__name__}: pass xtrain.ops.adam.DeepSpeedCPUAdam or another one of xtrain.ops, or leave "
            "the key out, since every optimizer works on offloaded states here"
        )


def check_elementwise(optimizer: torch.optim.Optimizer, stage: int, allow_untested: bool) -> None:
    """Refuse a user's optimizer that may not work on slices of parameters, which it sees from ZeRO stage 1 on.

    Raises:
        ConfigError: the class is not known to be element-wise and the config does not allow it.
    """
    known = isinstance(optimizer, ChunkedOptimizer) or type(optimizer) in _ELEMENTWISE
    if (
        known or stage == 0 or getattr(type(optimizer), "xtrain_elementwise", False)
    ):  # the last: apex's, in shims/
        return
    name = type(optimizer).__name__
    if not allow_untested:
        raise ConfigError(
            f"the optimizer {name} is not known to update each element on its own, which ZeRO stage {stage} needs: set "
            '"zero_allow_untested_optimizer": true if it does, or use stage 0'
        )
    log_dist(
        f"the optimizer {name} is not known to update each element on its own: in ZeRO stage {stage} it sees "
        "one-dimensional slices of several parameters each, so that whatever it makes of a parameter's shape, rows, "
        "norm or number (factored moments, preconditioners, trust ratios, clipping) is not what it is in stage 0",
        ranks=[0],
        level=logging.WARNING,
    )
