"""L2 norms of lists of tensors. All return ([1], [number of tensors] or empty): of all, and of each if asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xtrain.shims.apex.kernels.lists import Number, TensorLists, is_set, note, together, wide

Norms = tuple[torch.Tensor, torch.Tensor]


def _norms(
    tensors: Sequence[torch.Tensor], noop_flag: torch.Tensor, per_tensor: bool | None, scale: Number
) -> Norms:
    each = torch.stack([torch.linalg.vector_norm(wide(tensor) * scale) for tensor in tensors]).float()
    note(noop_flag, each * each)  # apex looks at the sums of squares
    return torch.linalg.vector_norm(each).reshape(1), each if per_tensor else each.new_empty(0)


@torch.no_grad()
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: TensorLists, per_tensor: bool | None = False
) -> Norms:
    """[x]: their norm; the flag says whether a sum of squares is not finite in float32."""
    return _norms(tensor_lists[0], noop_flag, per_tensor, 1.0)


@torch.no_grad()
def multi_tensor_l2norm_mp(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: TensorLists, per_tensor: bool | None = False
) -> Norms:
    """[x]: their norm as `multi_tensor_l2norm`, but 0 when the flag is set already."""
    if is_set(noop_flag):
        zeros = torch.zeros(len(tensor_lists[0]), device=noop_flag.device)
        return zeros.new_zeros(1), zeros if per_tensor else zeros[:0]
    return _norms(tensor_lists[0], noop_flag, per_tensor, 1.0)


@torch.no_grad()
def multi_tensor_l2norm_scale(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    scale: Number,
    per_tensor: bool | None = False,
) -> Norms:
    """[source, target]: the sources' norm, before target = source * scale."""
    found = _norms(tensor_lists[0], noop_flag, per_tensor, 1.0)
    for source, target in together(tensor_lists, 2, "multi_tensor_l2norm_scale"):
        target.copy_((wide(source) * scale).view_as(target))
    return found


@torch.no_grad()
def multi_tensor_unscale_l2norm(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: TensorLists,
    inv_scale: torch.Tensor,
    per_tensor: bool | None = False,
) -> Norms:
    """[x]: the norm of x * inv_scale; x stays as it is."""
    return _norms(tensor_lists[0], noop_flag, per_tensor, inv_scale.reshape(()))
