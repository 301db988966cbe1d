"""One step of SGD, Adagrad and NovoGrad over lists of tensors."""

from __future__ import annotations

import torch

from xtrain.shims.apex.kernels.adam import corrections
from xtrain.shims.apex.kernels.lists import TensorLists, is_set, together, wide


@torch.no_grad()
def multi_tensor_sgd(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    wd: float,
    momentum: float,
    dampening: float,
    lr: float,
    nesterov: bool,
    first_run: bool,
    wd_after_momentum: bool,
    scale: float,
) -> None:
    """[gradients, weights, momenta], and perhaps copies of the weights in 16 bits; gradients count times `scale`.

    Nothing happens if the flag is set. In the first run the momentum is the gradient itself.
    """
    if is_set(noop_flag):
        return
    for grad, weight, buffer, *copies in together(tensor_lists, len(tensor_lists), "multi_tensor_sgd"):
        gradient = wide(grad).view_as(weight) * scale
        if wd != 0 and not wd_after_momentum:
            gradient = gradient + wd * wide(weight)
        if momentum != 0:
            moved = gradient if first_run else momentum * wide(buffer) + (1 - dampening) * gradient
            buffer.copy_(moved)
            gradient = gradient + momentum * moved if nesterov else moved
        if wd != 0 and wd_after_momentum:
            gradient = gradient + wd * wide(weight)
        weight.copy_(wide(weight) - lr * gradient)
        for copy in copies:
            copy.copy_(weight)


@torch.no_grad()
def multi_tensor_adagrad(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    lr: float,
    epsilon: float,
    mode: int,
    weight_decay: float,
) -> None:
    """[gradients, parameters, sums of squares]; `mode` 0 adds the decay to the gradient, 1 to the update."""
    for grad, param, total in together(tensor_lists, 3, "multi_tensor_adagrad"):
        gradient = wide(grad).view_as(param)
        if mode == 0:
            gradient = gradient + weight_decay * wide(param)
        summed = wide(total) + gradient * gradient
        total.copy_(summed)
        update = gradient / (summed.sqrt() + epsilon)
        if mode != 0:
            update = update + weight_decay * wide(param)
        param.copy_(wide(param) - lr * update)


@torch.no_grad()
def multi_tensor_novograd(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    grad_norms: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    bias_correction: int,
    weight_decay: float,
    grad_averaging: int,
    mode: int,
    norm_type: int,
) -> None:
    """[gradients, parameters, first moments]; `grad_norms`, float32 [number of tensors], is the second moment's root.

    `norm_type` 2 blends squares of L2 norms, 0 blends largest magnitudes; `mode` 0 normalises and decays before the
    momentum, 1 after it.
    """
    divided_by, under = corrections(bias_correction, (beta1, beta2), int(step))
    beta3 = 1 - beta1 if grad_averaging else 1.0
    for number, (grad, param, moment) in enumerate(together(tensor_lists, 3, "multi_tensor_novograd")):
        gradient, old = wide(grad).view_as(param), wide(param)
        blended = grad_norms[number]
        if norm_type == 0:
            blended.copy_(beta2 * blended + (1 - beta2) * gradient.abs().max())
        else:
            blended.copy_((beta2 * blended**2 + (1 - beta2) * gradient.square().sum()).sqrt())
        denominator = blended / under**0.5 + epsilon
        if mode == 0:
            gradient = gradient / denominator + weight_decay * old
        mean = beta1 * wide(moment) + beta3 * gradient
        moment.copy_(mean)
        update = mean / divided_by
        if mode != 0:
            update = update / denominator + weight_decay * old
        param.copy_(old - lr * update)
