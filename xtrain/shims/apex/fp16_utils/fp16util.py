"""Converts networks to 16 bits, and copies between their parameters and float32 masters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from xtrain.shims.apex.apex_C import flatten, unflatten

clip_grad_norm = torch.nn.utils.clip_grad_norm_

Params = Sequence[torch.Tensor]


class tofp16(nn.Module):
    """Converts its input to float16."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The input in float16."""
        return input.half()


def _keeps_float(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine is True


def BN_convert_float(module: nn.Module) -> nn.Module:
    """The module with its batch norms (those with weights) in float32."""
    for inner in module.modules():
        if _keeps_float(inner):
            inner.float()
    return module


def network_to_half(network: nn.Module) -> nn.Module:
    """The network in float16, batch norms in float32, behind a conversion of its input."""
    return nn.Sequential(tofp16(), BN_convert_float(network.half()))


def convert_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's own floating-point parameters, gradients and buffers; not those of its children."""
    for param in module.parameters(recurse=False):
        if param.is_floating_point():
            grad = param.grad
            param.grad = None  # a gradient must be of its parameter's dtype
            param.data = param.data.to(dtype)
            param.grad = None if grad is None else grad.to(dtype)
    for buffer in module.buffers(recurse=False):
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def convert_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The network in another dtype, except for its batch norms with weights."""
    for module in network.modules():
        if _keeps_float(module):
            continue
        convert_module(module, dtype)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return network


class FP16Model(nn.Module):
    """A network in float16 that converts its inputs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = convert_network(network, torch.half)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """What the network gives for the inputs in float16."""
        return self.network(*(given.half() for given in inputs))


def prep_param_lists(
    model: nn.Module, flat_master: bool = False
) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """(the parameters that are trained, their float32 masters); flat: one master for all of them.

    Raises:
        ValueError: parameters of different dtypes, when the master is to be flat.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    if not flat_master:
        return params, [param.detach().clone().float().requires_grad_() for param in params]
    if len({param.dtype for param in params}) > 1:
        raise ValueError("parameters of different dtypes have no flat master: use flat_master=False")
    master = nn.Parameter(flatten([param.detach() for param in params]).float())
    master.grad = torch.zeros_like(master)
    return params, [master]


@torch.no_grad()
def model_grads_to_master_grads(
    model_params: Params, master_params: Params, flat_master: bool = False
) -> None:
    """Copy gradients to the masters; of a parameter without one the master has none."""
    if flat_master:
        grads = [param.grad for param in model_params]
        assert master_params[0].grad is not None
        master_params[0].grad.copy_(flatten([grad for grad in grads if grad is not None]))
        return
    for model, master in zip(model_params, master_params, strict=True):
        master.grad = None if model.grad is None else model.grad.to(master.dtype, copy=True)


@torch.no_grad()
def master_params_to_model_params(
    model_params: Params, master_params: Params, flat_master: bool = False
) -> None:
    """Copy the masters' values to the parameters."""
    masters = unflatten(master_params[0], model_params) if flat_master else master_params
    for model, master in zip(model_params, masters, strict=True):
        model.data.copy_(master)


def to_python_float(t: Any) -> Any:
    """The number in a tensor of one element, or the first of a list."""
    return t.item() if hasattr(t, "item") else t[0]
