"""`initialize` for `"xtrain": {"engine": "deepspeed"}`: the same call, made to the installed DeepSpeed.

Only a hand-over: the backend is presented, the config goes without its "xtrain" section, the recorder is attached.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from xtrain import comm
from xtrain.align import run_recording
from xtrain.backends import Backend
from xtrain.base.errors import ConfigError
from xtrain.config import XtrainConfig
from xtrain.config.backend import choose_backend
from xtrain.deepspeed_engine.accelerator import import_deepspeed, present
from xtrain.parallel import model_from_mpu
from xtrain.zero import foreign
from xtrain.zero.home import ZeroParamStatus, home_of
from xtrain.zero.model_hooks import external_parameters

_trained: Any = WeakIdKeyDictionary()
"""Parameters that DeepSpeed's engine trains."""


def fragment_function(param: torch.Tensor, name: str) -> Callable[..., Any] | None:
    """DeepSpeed's function of that name in its `utils.tensor_fragment`, for parameters that its engine trains."""
    if param not in _trained:
        return None
    found: Callable[..., Any] = getattr(importlib.import_module("deepspeed.utils.tensor_fragment"), name)
    return found


def deepspeed_for(backend: Backend) -> Any:
    """The installed DeepSpeed, with the backend as its accelerator and the running process group as its own.

    Raises:
        BackendError: it is not installed, or does not fit.
    """
    deepspeed = import_deepspeed(backend.runtime.device_type)
    current = deepspeed.accelerator.get_accelerator()
    if getattr(current, "backend", None) is not backend:
        present(backend, deepspeed)
    os.environ.setdefault("LOCAL_RANK", str(comm.get_local_rank()))  # a lone process has none; DeepSpeed asks
    deepspeed.init_distributed(backend.collectives.process_group_backend, verbose=False)
    return deepspeed


def config_for_deepspeed(config: XtrainConfig) -> dict[str, Any]:
    """The configuration as the user wrote it, without what is ours."""
    theirs = copy.deepcopy({key: value for key, value in config.raw.items() if key != "xtrain"})
    if isinstance(theirs.get("checkpoint"), dict):
        theirs["checkpoint"].pop("format", None)
    return theirs


def _without_config(args: Any) -> Any:
    """A copy of the script's arguments that names no config: the checked one is passed."""
    if args is None:
        return None
    args = copy.copy(args)
    for name in ("deepspeed_config", "deepscale_config"):
        if getattr(args, name, None) is not None:
            setattr(args, name, None)
    return args


def initialize(config: XtrainConfig, backend: Backend, args: Any, model: nn.Module, **call: Any) -> Any:
    """What `deepspeed.initialize` returns for the call.

    Args:
        call: the other arguments of `initialize`, as the script gave them.

    Raises:
        BackendError: DeepSpeed is not installed, or does not fit.
        ConfigError: the model was built by xtrain's own zero.Init.
    """
    if any(home_of(param) is not None for param in model.parameters()):
        raise ConfigError(
            "the model is divided by xtrain's zero.Init, and config key 'xtrain.engine' is 'deepspeed': give the same "
            "config to zero.Init(config_dict_or_path=...), which then is DeepSpeed's"
        )
    deepspeed = deepspeed_for(backend)
    for module in model.modules():
        for param in external_parameters(module):
            deepspeed.zero.register_external_parameter(module, param)
    result = deepspeed.initialize(
        args=_without_config(args), model=model, config=config_for_deepspeed(config), **call
    )
    who = {"engine": "deepspeed", "deepspeed": deepspeed.__version__}
    for param in result[0].module.parameters():
        _trained[param] = True
    run_recording.attach(result[0], config, backend, who, model_from_mpu(call["mpu"]).reports_loss)
    return result


def zero_init(config: XtrainConfig, call: dict[str, Any]) -> Any:
    """DeepSpeed's zero.Init for a config that chooses its engine; `call`: the arguments by name."""
    backend = choose_backend(config)
    backend.prepare(comm.get_local_rank())
    comm.init_distributed(dist_backend=backend.collectives.process_group_backend, verbose=False)
    theirs = {
        name: value for name, value in call.items() if name not in ("self", "config", "config_dict_or_path")
    }
    return deepspeed_for(backend).zero.Init(config_dict_or_path=config_for_deepspeed(config), **theirs)


def _sharded_there(param: nn.Parameter) -> bool:
    """Whether DeepSpeed's stage 3 has divided it; ours gives the same attributes, with a status of its own class."""
    return hasattr(param, "ds_tensor") and not isinstance(getattr(param, "ds_status", None), ZeroParamStatus)


def gathered(params: list[Any], modifier_rank: int | None, fwd_module: nn.Module | None) -> Any:
    """DeepSpeed's GatheredParameters for those of `params` that its ZeRO stage 3 has divided."""
    theirs = [param for param in params if _sharded_there(param)]
    if not theirs:
        return nullcontext()
    deepspeed = sys.modules["deepspeed"]  # it has made them
    return deepspeed.zero.GatheredParameters(theirs, modifier_rank=modifier_rank, fwd_module=fwd_module)


def register_external(module: nn.Module, param: nn.Parameter) -> None:
    """Tell DeepSpeed too, of a parameter that its ZeRO stage 3 has divided."""
    if _sharded_there(param):
        sys.modules["deepspeed"].zero.register_external_parameter(module, param)


foreign.register("deepspeed", sys.modules[__name__])
