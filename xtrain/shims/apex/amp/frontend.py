"""`amp.initialize` and its checkpoints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from xtrain.shims.apex.amp._amp_state import Properties, _amp_state
from xtrain.shims.apex.amp.casts import apply_registered, cast
from xtrain.shims.apex.amp.optimizer import Stash
from xtrain.shims.apex.amp.scaler import LossScaler
from xtrain.shims.apex.fp16_utils.fp16util import convert_network
from xtrain.shims.apex.parallel.distributed import DistributedDataParallel
from xtrain.shims.apex.parallel.LARC import LARC

LEVELS = {
    "O0": Properties(True, "O0", torch.float32, False, None, False, 1.0),
    "O1": Properties(True, "O1", None, True, None, None, "dynamic"),
    "O2": Properties(True, "O2", torch.float16, False, True, True, "dynamic"),
    "O3": Properties(True, "O3", torch.float16, False, False, False, 1.0),
}
_WRAPPERS = (nn.parallel.DistributedDataParallel, DistributedDataParallel, nn.DataParallel)


def _options(opt_level: str, given: dict[str, Any]) -> Properties:
    """A level's options with what the script gives in their place.

    Raises:
        RuntimeError: no such level, or options that O1 excludes.
    """
    if opt_level not in LEVELS:
        raise RuntimeError(
            f"Unexpected optimization level {opt_level}. Options are {', '.join(LEVELS)} (with an O)."
        )
    chosen = {name: value for name, value in given.items() if value is not None}
    keep = chosen.get("keep_batchnorm_fp32")
    if isinstance(keep, str):
        if keep not in ("True", "False"):
            raise RuntimeError(f"keep_batchnorm_fp32 must be a boolean, or its name, not {keep!r}")
        chosen["keep_batchnorm_fp32"] = keep == "True"
    if chosen.get("loss_scale", "dynamic") != "dynamic":
        chosen["loss_scale"] = float(chosen["loss_scale"])
    if opt_level == "O1":
        for name in ("cast_model_type", "keep_batchnorm_fp32", "master_weights"):
            if chosen.get(name) not in (None, False, torch.float32):
                raise RuntimeError(f"{name} has no place in O1, where weights stay float32: use O2 or O3")
            chosen.pop(name, None)
    elif chosen.get("patch_torch_functions"):
        raise RuntimeError("patch_torch_functions=True should only be set by opt_level='O1'")
    return replace(LEVELS[opt_level], **chosen)


def _check(model: nn.Module) -> None:
    """Raises RuntimeError for a model that is wrapped already, or is not float32."""
    if isinstance(model, _WRAPPERS):
        raise RuntimeError(
            f"amp.initialize comes before {type(model).__name__}: wrap the model that it returns"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dtype == torch.float16:
            raise RuntimeError(f"{name} is float16 already: amp.initialize takes the model as float32")


def _around(
    forward: Callable[..., Any], options: Properties, device: str, outputs: torch.dtype | None
) -> Callable[..., Any]:
    """The forward pass with its casts."""
    inputs = options.cast_model_type

    def run(*args: Any, **kwargs: Any) -> Any:
        if inputs is not None:
            args, kwargs = cast(args, inputs), cast(kwargs, inputs)
        autocast = options.patch_torch_functions and _amp_state.casting
        with torch.autocast(device, dtype=torch.float16, enabled=autocast):
            result = forward(*args, **kwargs)
        return cast(result, outputs or torch.float32)

    return run


def _state_in_float32(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key, value in state.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float16:
            state[key] = value.float()


def _prepare(model: nn.Module, options: Properties, outputs: torch.dtype | None) -> None:
    dtype = options.cast_model_type
    if dtype is not None:
        if options.keep_batchnorm_fp32:
            convert_network(model, dtype)
        else:
            model.to(dtype)
        model._register_state_dict_hook(_state_in_float32)
    device = next((param.device.type for param in model.parameters()), "cpu")
    model.forward = _around(model.forward, options, device, outputs)


def _as_list(given: Any, kind: Any, name: str) -> list[Any]:
    if isinstance(given, kind):
        return [given]
    if isinstance(given, list):
        return given
    raise TypeError(f"{name} must be one or a list of them, not {type(given).__name__}")


def initialize(
    models: Any,
    optimizers: Any = None,
    enabled: bool = True,
    opt_level: str = "O1",
    cast_model_type: torch.dtype | None = None,
    patch_torch_functions: bool | None = None,
    keep_batchnorm_fp32: bool | str | None = None,
    master_weights: bool | None = None,
    loss_scale: float | str | None = None,
    cast_model_outputs: torch.dtype | None = None,
    num_losses: int = 1,
    verbosity: int = 1,
    min_loss_scale: float | None = None,
    max_loss_scale: float = 2.0**24,
) -> Any:
    """Prepare models and optimizers; returns them as they were given, alone or in lists.

    O0 is float32; O1 runs the forward pass under autocast to float16 and scales the loss (apex casts around
    torch's functions, here torch's own lists decide which run in float16; outputs are float32); O2 has float16 weights,
    float32 batch norms and masters; O3 is float16 throughout.

    Raises:
        RuntimeError: unknown level, options that exclude each other, a model that is wrapped or float16 already.
        TypeError: models or optimizers of another type.
    """
    _amp_state.verbosity = verbosity
    alone = optimizers is None
    if not enabled:
        _amp_state.opt_properties = Properties()
        return models if alone else (models, optimizers)
    options = _options(
        opt_level,
        {
            "cast_model_type": cast_model_type,
            "patch_torch_functions": patch_torch_functions,
            "keep_batchnorm_fp32": keep_batchnorm_fp32,
            "master_weights": master_weights,
            "loss_scale": loss_scale,
        },
    )
    model_list = _as_list(models, nn.Module, "models")
    optimizer_list = [] if alone else _as_list(optimizers, (torch.optim.Optimizer, LARC), "optimizers")
    for model in model_list:
        _check(model)
    for model in model_list:
        _prepare(model, options, cast_model_outputs)
    _amp_state.opt_properties = options
    _amp_state.loss_scalers = [
        LossScaler(options.loss_scale, min_loss_scale=min_loss_scale, max_loss_scale=max_loss_scale)
        for _ in range(num_losses)
    ]
    for optimizer in optimizer_list:
        Stash.attach(optimizer, bool(options.master_weights))
    if options.patch_torch_functions:
        apply_registered()
    told = ", ".join(f"{part.name}={getattr(options, part.name)}" for part in fields(options))
    _amp_state.says(f"apex.amp (in PyTorch): {told}")
    return models if alone else (models, optimizers)


def state_dict(destination: dict[str, Any] | None = None) -> dict[str, Any]:
    """The loss scalers' states, for a checkpoint."""
    found: dict[str, Any] = OrderedDict() if destination is None else destination
    for number, scaler in enumerate(_amp_state.loss_scalers):
        found[f"loss_scaler{number}"] = {"loss_scale": scaler.loss_scale(), "unskipped": scaler._unskipped}
    return found


def load_state_dict(state_dict: dict[str, Any]) -> None:
    """Restore the loss scalers; those that a checkpoint has too many are left out, with a warning.

    Raises:
        RuntimeError: keys that are not loss scalers'.
    """
    wrong = [key for key in state_dict if "loss_scaler" not in key]
    if wrong:
        raise RuntimeError(
            f"Error(s) in loading state_dict. Unexpected key(s) in state_dict: {', '.join(wrong)}."
        )
    if len(state_dict) != len(_amp_state.loss_scalers):
        print(
            f"Warning: state_dict has {len(state_dict)} entries, and num_losses is {len(_amp_state.loss_scalers)}"
        )
    for scaler, state in zip(_amp_state.loss_scalers, state_dict.values(), strict=False):
        scaler._loss_scale = state["loss_scale"]
        scaler._unskipped = state["unskipped"]
