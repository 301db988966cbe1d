"""One step of Adam over lists of tensors. `mode` 0 adds the decay to the gradient (Adam), 1 to the update (AdamW)."""

from __future__ import annotations

import torch

from xtrain.shims.apex.kernels.lists import Number, TensorLists, is_set, together, wide


def _step(
    grad: torch.Tensor,
    param: torch.Tensor,
    moment: torch.Tensor,
    square: torch.Tensor,
    lr: Number,
    betas: tuple[float, float],
    eps: float,
    corrections: tuple[float, float],
    mode: int,
    weight_decay: float,
) -> None:
    """Update a parameter and its moments in place; those of 16 bits by way of float32 copies."""
    value, mean, variance = wide(param), wide(moment), wide(square)
    gradient = wide(grad).view_as(param)
    if mode == 0 and weight_decay != 0:
        gradient = gradient.add(value, alpha=weight_decay)
    mean.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    variance.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    update = (mean / corrections[0]).div_((variance / corrections[1]).sqrt_().add_(eps))
    if mode != 0 and weight_decay != 0:
        update.add_(value, alpha=weight_decay)
    value.sub_(update.mul_(lr))
    for target, result in ((param, value), (moment, mean), (square, variance)):
        if target is not result:
            target.copy_(result)


def corrections(bias_correction: int, betas: tuple[float, float], step: int) -> tuple[float, float]:
    """What the moments are divided by in this step, counted from 1."""
    return (1 - betas[0] ** step, 1 - betas[1] ** step) if bias_correction else (1.0, 1.0)


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """[gradients, parameters, first moments, second moments]; the flag is neither read nor set, as in apex."""
    divided_by = corrections(bias_correction, (beta1, beta2), int(step))
    for grad, param, moment, square in together(tensor_lists, 4, "multi_tensor_adam"):
        _step(grad, param, moment, square, lr, (beta1, beta2), epsilon, divided_by, mode, weight_decay)


@torch.no_grad()
def multi_tensor_adam_capturable(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: torch.Tensor,
) -> None:
    """As `multi_tensor_adam`; gradients are multiplied by `inv_scale` first, in place; nothing happens if flagged."""
    if is_set(noop_flag):
        return
    divided_by = corrections(bias_correction, (beta1, beta2), int(step))
    for grad, param, moment, square in together(tensor_lists, 4, "multi_tensor_adam_capturable"):
        unscaled = wide(grad) * inv_scale
        grad.copy_(unscaled)
        _step(unscaled, param, moment, square, lr, (beta1, beta2), epsilon, divided_by, mode, weight_decay)


@torch.no_grad()
def multi_tensor_adam_capturable_master(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: torch.Tensor,
    mode: int,
    bias_correction: int,
    weight_decay: float,
    inv_scale: torch.Tensor,
) -> None:
    """As `multi_tensor_adam_capturable`, with a fifth list of float32 masters, which the parameters are copied from."""
    if is_set(noop_flag):
        return
    pairs = [(each[1], each[4]) for each in together(tensor_lists, 5, "multi_tensor_adam_capturable_master")]
    grads, _, moments, squares, masters = tensor_lists
    multi_tensor_adam_capturable(
        chunk_size, noop_flag, [grads, masters, moments, squares], lr, beta1, beta2, epsilon, step, mode,
        bias_correction, weight_decay, inv_scale,
    )  # fmt: skip
    for param, master in pairs:
        param.copy_(master)
