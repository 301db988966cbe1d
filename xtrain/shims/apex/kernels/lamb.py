"""LAMB over lists of tensors: the update as in Adam, then each tensor's own ratio of norms."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xtrain.shims.apex.kernels.adam import corrections
from xtrain.shims.apex.kernels.lists import Number, TensorLists, is_set, together, wide
from xtrain.shims.apex.kernels.norms import multi_tensor_l2norm


def _clip(norm: torch.Tensor, most: Number) -> torch.Tensor:
    """What gradients are divided by, so that their norm is at most `most`."""
    norm = norm.reshape(())
    return torch.where(norm > most, norm / most, torch.ones_like(norm))


def _update(
    gradient: torch.Tensor,
    param: torch.Tensor,
    moment: torch.Tensor,
    square: torch.Tensor,
    factors: tuple[float, float, float],
    divided_by: tuple[float, float],
    eps: float,
    mode: int,
    decay: Number,
) -> torch.Tensor:
    """The update before the ratio. `factors`: beta1, beta2 and what the gradient adds to the first moment."""
    beta1, beta2, beta3 = factors
    if mode == 0:
        gradient = gradient + decay * wide(param)
    mean = beta1 * wide(moment) + beta3 * gradient
    variance = beta2 * wide(square) + (1 - beta2) * gradient * gradient
    moment.copy_(mean)
    square.copy_(variance)
    update = (mean / divided_by[0]) / ((variance / divided_by[1]).sqrt() + eps)
    return update if mode == 0 else update + decay * wide(param)


def _apply(
    params: Sequence[torch.Tensor],
    updates: Sequence[torch.Tensor],
    param_norms: torch.Tensor,
    update_norms: torch.Tensor,
    lr: Number,
    weight_decay: float,
    use_nvlamb: bool | None,
) -> None:
    """param -= lr * ratio * update; the ratio of norms counts with a decay, or always in NVLAMB."""
    for number, (param, update) in enumerate(zip(params, updates, strict=True)):
        rate: Number = lr
        if use_nvlamb or weight_decay != 0:
            param_norm, update_norm = param_norms[number], update_norms[number]
            both = (param_norm != 0) & (update_norm != 0)
            rate = lr * torch.where(both, param_norm / update_norm, torch.ones_like(param_norm))
        param.copy_(wide(param) - rate * wide(update).view_as(param))


@torch.no_grad()
def multi_tensor_lamb(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    lr: Number,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    bias_correction: int,
    weight_decay: float,
    grad_averaging: int,
    mode: int,
    global_grad_norm: torch.Tensor,
    max_grad_norm: Number,
    use_nvlamb: bool | None = False,
) -> None:
    """[gradients, parameters, first moments, second moments]. The gradients hold the updates afterwards, as in apex."""
    betas = (beta1, beta2)
    factors = (beta1, beta2, 1 - beta1 if grad_averaging else 1.0)
    clip = _clip(global_grad_norm, max_grad_norm)
    grads, params = tensor_lists[0], tensor_lists[1]
    _, param_norms = multi_tensor_l2norm(chunk_size, noop_flag, [params], True)
    for grad, param, moment, square in together(tensor_lists, 4, "multi_tensor_lamb"):
        gradient = wide(grad).view_as(param) / clip
        divided_by = corrections(bias_correction, betas, int(step))
        grad.copy_(_update(gradient, param, moment, square, factors, divided_by, epsilon, mode, weight_decay))
    _, update_norms = multi_tensor_l2norm(chunk_size, noop_flag, [grads], True)
    _apply(params, grads, param_norms, update_norms, lr, weight_decay, use_nvlamb)


@torch.no_grad()
def multi_tensor_lamb_mp(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    lr: torch.Tensor,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: torch.Tensor,
    bias_correction: int,
    weight_decay: float,
    grad_averaging: int,
    mode: int,
    global_grad_norm: torch.Tensor,
    max_grad_norm: torch.Tensor,
    use_nvlamb: bool | None,
    found_inf: torch.Tensor,
    inv_scale: torch.Tensor,
) -> None:
    """As `multi_tensor_lamb` with gradients times `inv_scale`; nothing happens if `found_inf`.

    A fifth list gets the parameters in its own dtype.
    """
    if is_set(found_inf):
        return
    for grad in tensor_lists[0]:
        grad.mul_(inv_scale)
    multi_tensor_lamb(
        chunk_size, noop_flag, tensor_lists[:4], lr, beta1, beta2, epsilon, int(step), bias_correction, weight_decay,
        grad_averaging, mode, global_grad_norm, max_grad_norm, use_nvlamb,
    )  # fmt: skip
    if len(tensor_lists) == 5:
        for param, copy in zip(tensor_lists[1], tensor_lists[4], strict=True):
            copy.copy_(param)


@torch.no_grad()
def multi_tensor_lamb_stage1_cuda(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    per_tensor_decay: torch.Tensor,
    step: int,
    beta1: float,
    beta2: float,
    epsilon: float,
    global_grad_norm: torch.Tensor,
    max_global_grad_norm: float,
) -> None:
    """[gradients, parameters, first moments, second moments, updates]: the updates, with each tensor's own decay."""
    divided_by = corrections(1, (beta1, beta2), int(step))
    clip = _clip(global_grad_norm, max_global_grad_norm)
    lists = together(tensor_lists, 5, "multi_tensor_lamb_stage1_cuda")
    for number, (grad, param, moment, square, update) in enumerate(lists):
        gradient = wide(grad).view_as(param) / clip
        factors = (beta1, beta2, 1 - beta1)
        decay = per_tensor_decay[number]
        update.copy_(_update(gradient, param, moment, square, factors, divided_by, epsilon, 1, decay))


@torch.no_grad()
def multi_tensor_lamb_stage2_cuda(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    per_tensor_param_norm: torch.Tensor,
    per_tensor_update_norm: torch.Tensor,
    lr: float,
    weight_decay: float,
    use_nvlamb: bool | None = False,
) -> None:
    """[parameters, updates]: the parameters after the step."""
    params, updates = tensor_lists
    _apply(params, updates, per_tensor_param_norm, per_tensor_update_norm, lr, weight_decay, use_nvlamb)
