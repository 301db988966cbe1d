"""Muon for matrices and Adam for the rest, over parameters or over slices of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from xtrain.base.errors import ConfigError, NotImplementedYetError, unknown_name
from xtrain.optim.adam import Adam
from xtrain.optim.chunked import check_options, refuse_options
from xtrain.optim.exchange import Exchange, assign, rounds
from xtrain.optim.newton_schulz import METHODS, muon_direction
from xtrain.optim.parameterwise import ParameterwiseOptimizer, ParamFragments, shape_of

_MUON_DEFAULTS = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "ns_method": "gram", "ns_steps": 5}
_ADAM_DEFAULTS = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
_NOT_MUON = ("embed", "lm_head")
"""Matrices with this in their names are left to Adam, as in DeepSpeed."""


class Muon(ParameterwiseOptimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al., 2024), with AdamW for what is no matrix.

    Groups, options and defaults are those of DeepSpeed's MuonWithAuxAdam. The momentum is averaged
    (`m = beta m + (1 - beta) g`), looks one step ahead (Nesterov), is orthogonalised as a whole matrix and
    scaled, and moves the weight by `lr` after a decoupled decay.

    Under an engine the orthogonalised update takes the gradient's place before clipping, as in DeepSpeed's ZeRO
    stages 1 to 3: the reported norm and `gradient_clipping` are of the update.

    Args:
        param_groups: dictionaries with `params` and `use_muon`. With it: `lr`, `momentum`, `weight_decay`,
            `ns_method` (`gram` or `standard`), `ns_steps`. Without: `lr`, `betas`, `eps`, `weight_decay`.
        adam_w_mode: decouple Adam's weight decay from the gradient.
    """

    rewrites_gradients = True

    def __init__(self, param_groups: Iterable[dict[str, Any]], adam_w_mode: bool = True) -> None:
        groups = []
        for given in param_groups:
            if not isinstance(given, dict) or "use_muon" not in given:
                raise ConfigError("Muon takes parameter groups, each with 'use_muon': true or false")
            more = {} if given["use_muon"] else {"adam_w_mode": adam_w_mode, "bias_correction": True}
            defaults = _MUON_DEFAULTS if given["use_muon"] else _ADAM_DEFAULTS
            groups.append({**defaults, **more, **given})
        super().__init__(groups, {})
        for group in self.param_groups:
            _check(group)

    def rewrite_gradients(self) -> None:
        """Replace the gradients of the matrices by the orthogonalised momentum; collective over the group."""
        for group, held in self.param_fragments():
            if not group["use_muon"]:
                continue
            beta = group["momentum"]
            for tensor in dict.fromkeys(item.tensor for item in held):
                momentum = self.count_step(tensor, ("momentum_buffer",))["momentum_buffer"]
                assert tensor.grad is not None
                for grad, average in self.chunks(tensor.grad, momentum):
                    average.lerp_(grad, 1.0 - beta)
                    grad.lerp_(average, beta)
            for batch in rounds(held, self.ranks):
                self._orthogonalize(batch, group)

    def _orthogonalize(self, items: list[ParamFragments], group: dict[str, Any]) -> None:
        if self.ranks == 1:
            for item in items:
                part = _gradient(item)
                # A copy of its own: kernels round by memory alignment, and slices lie anywhere.
                blend = part.to(item.parameter.device, copy=True).view(item.shape)
                part.copy_(self._direction(item, blend, group).reshape(part.shape))
            return
        owners = assign([_cost(item.shape) for item in items], self.ranks)
        exchange = Exchange(items, owners, self.process_group)
        wholes = exchange.bring(_gradient)
        results = [
            self._direction(item, whole, group) for item, whole in zip(exchange.mine, wholes, strict=True)
        ]
        exchange.take_back(results, _gradient)

    def _direction(self, item: ParamFragments, blend: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        method = group["ns_method"]
        heads = getattr(item.parameter, "muon_num_heads", None)
        return muon_direction(blend, group["ns_steps"], method, self._dtype(method, blend.dtype), heads)

    def _dtype(self, method: str, dtype: torch.dtype) -> torch.dtype:
        """Where the iteration runs: DeepSpeed's choice of half precision, unless bits must be the same everywhere."""
        half = torch.float16 if method == "gram" else torch.bfloat16
        if dtype == torch.float64 or self.aligned or half not in self.precision.native_dtypes:
            return torch.promote_types(dtype, torch.float32)
        return half

    def update(self) -> None:
        """Apply what `rewrite_gradients` made, and Adam to the rest."""
        for group, held in self.param_fragments():
            for tensor in dict.fromkeys(item.tensor for item in held):
                grad = tensor.grad
                assert grad is not None
                if group["use_muon"]:
                    for param, direction in self.chunks(tensor, grad):
                        param.mul_(1.0 - group["lr"] * group["weight_decay"])
                        param.add_(direction, alpha=-group["lr"])
                else:
                    state = self.count_step(tensor, Adam.state_names)
                    moments = [state[name] for name in Adam.state_names]
                    for param, own, *parts in self.chunks(tensor, grad, *moments):
                        Adam.arithmetic(param, own, parts, state["step"], group)


def _gradient(item: ParamFragments) -> torch.Tensor:
    assert item.tensor.grad is not None
    return item.part(item.tensor.grad)


def _cost(shape: torch.Size) -> float:
    """Multiplications of one Newton-Schulz step, up to a factor."""
    rows = shape[0] if len(shape) == 4 else shape[-2]
    return float(shape.numel() * min(rows, shape.numel() // rows)) if rows else 0.0


def _check(group: dict[str, Any]) -> None:
    betas = {} if group["use_muon"] else {"betas": group["betas"]}
    check_options(**betas, lr=group["lr"], weight_decay=group["weight_decay"])
    if not group["use_muon"]:
        return
    if group["ns_method"] not in METHODS:
        raise ConfigError(unknown_name("ns_method", str(group["ns_method"]), METHODS))
    if not 0.0 <= group["momentum"] < 1.0 or group["ns_steps"] < 1:
        raise ConfigError(
            f"momentum must be in [0, 1) and ns_steps positive, got {group['momentum']} and {group['ns_steps']}"
        )
    for param in group["params"]:
        shape, heads = shape_of(param), getattr(param, "muon_num_heads", None)
        if len(shape) < 2:
            raise ConfigError(
                f"Muon works on matrices, and a parameter of shape {tuple(shape)} has use_muon set: "
                "put it into a group with 'use_muon': false"
            )
        if heads is not None and (len(shape) != 2 or heads < 1 or shape[0] % heads):
            raise ConfigError(f"muon_num_heads={heads} does not divide a parameter of shape {tuple(shape)}")


def tag_parameters(names: Mapping[Any, str]) -> None:
    """Set `use_muon` on the model's parameters, as DeepSpeed does: matrices, but no embeddings and no output layer.

    A parameter that has the attribute keeps it.
    """
    for param, name in names.items():
        if not hasattr(param, "use_muon"):
            left_out = any(word in name.lower() for word in _NOT_MUON)
            param.use_muon = len(shape_of(param)) >= 2 and not left_out


def muon_from_config(
    param_groups: list[dict[str, Any]],
    lr: float | None = None,
    muon_lr: float | None = None,
    adam_lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    ns_method: str | None = None,
    ns_steps: int | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    adam_w_mode: bool = True,
    torch_adam: bool = False,
    per_head_muon: bool = False,
    fp32_optimizer_states: bool = True,
) -> Muon:
    """The optimizer of the config's type Muon; arguments are the entries of `optimizer.params`.

    Every group is split in two by `use_muon` (the group's own, or its parameters' attribute). A group's own
    options win over `muon_lr` and `adam_lr`, these over the shared ones.

    Args:
        torch_adam: accepted; there is one Adam here, and its arithmetic is PyTorch's.
    """
    if per_head_muon:
        raise NotImplementedYetError(
            "per_head_muon", "set `param.muon_num_heads` on the projections in the script"
        )
    refuse_options(fp32_optimizer_states=fp32_optimizer_states)
    shared = {"lr": lr, "weight_decay": weight_decay}
    halves: dict[bool, dict[str, Any]] = {
        True: {
            **shared,
            "momentum": momentum,
            "ns_method": ns_method,
            "ns_steps": ns_steps,
            "lr": _first(muon_lr, lr),
        },
        False: {**shared, "betas": betas, "eps": eps, "lr": _first(adam_lr, lr)},
    }
    groups = []
    for index, given in enumerate(param_groups):
        label = given.get("name") or (f"group{index}" if len(param_groups) > 1 else None)
        for use_muon, settings in halves.items():
            params = [param for param in given["params"] if _uses_muon(param, given) is use_muon]
            if not params:
                continue
            known = _MUON_DEFAULTS if use_muon else _ADAM_DEFAULTS
            options = {key: value for key, value in settings.items() if value is not None}
            options.update({key: value for key, value in given.items() if key in known})
            kind = "muon-params" if use_muon else "adam-params"
            name = f"{label}-{kind}" if label else kind
            groups.append({"params": params, "use_muon": use_muon, "name": name, **options})
    return Muon(groups, adam_w_mode)


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _uses_muon(param: torch.Tensor, group: Mapping[str, Any]) -> bool:
    flag = group.get("use_muon", getattr(param, "use_muon", None))
    if flag is None:
        raise ConfigError(
            f"Muon cannot tell what to do with a parameter of shape {tuple(param.shape)} that the model does not "
            "have: set `param.use_muon` to True or False"
        )
    return bool(flag)
