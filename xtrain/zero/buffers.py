"""Buffers that are not one block of memory: sparse matrices (a graph's adjacency, say) and others that need care.

torch neither moves them between ranks nor stores them in safetensors files; they consist of dense tensors that can be.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from xtrain import comm
from xtrain.base.errors import NotImplementedYetError
from xtrain.base.log import log_dist
from xtrain.parallel import DataParallelGrid
from xtrain.zero import names

_ROWS = {torch.sparse_csr, torch.sparse_bsr}
_COLUMNS = {torch.sparse_csc, torch.sparse_bsc}
_COMPRESSED = _ROWS | _COLUMNS
SPARSE = frozenset({torch.sparse_coo, *_COMPRESSED})


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether it is elements in memory, whatever the strides."""
    return tensor.layout == torch.strided


def storable(tensor: torch.Tensor) -> bool:
    """Whether a safetensors file can hold it; torch.save takes the rest."""
    return (
        is_dense(tensor)
        and tensor.dtype not in (torch.complex128, torch.complex32)
        and not tensor.is_quantized
    )


def _pieces(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a sparse one consists of: indices, then values. They share its memory."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in _ROWS:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def stored_bytes(tensor: torch.Tensor) -> int:
    """Size of what it consists of."""
    return tensor.nbytes if is_dense(tensor) else sum(piece.nbytes for piece in _pieces(tensor))


def _of_pieces(like: torch.Tensor, pieces: list[torch.Tensor], coalesced: bool) -> torch.Tensor:
    """A sparse tensor of these pieces, with the layout and shape of `like`."""
    if like.layout == torch.sparse_coo:
        indices, values = pieces
        return torch.sparse_coo_tensor(indices, values, like.shape, is_coalesced=coalesced)
    compressed, plain, values = pieces
    return torch.sparse_compressed_tensor(compressed, plain, values, like.shape, layout=like.layout)


def replace_buffer(module: nn.Module, old: torch.Tensor, new: torch.Tensor) -> None:
    """Let the module and its children have `new` wherever they have the buffer `old`."""
    for owner in module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is old:
                owner._buffers[name] = new


def set_buffer(module: nn.Module, buffer: torch.Tensor, new: torch.Tensor) -> None:
    """Give a buffer another value, of another dtype or number of stored elements where it must be."""
    if is_dense(buffer):
        buffer.data = new
    else:  # setting `.data` leaves a compressed matrix as it was, and says nothing
        replace_buffer(module, buffer, new)


def make_room(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Before `module.load_state_dict(state)`: let compressed matrices have as many elements as those to be loaded.

    torch copies only between matrices that have equally many.
    """
    for name, buffer in list(names.buffers(module)):
        saved = state.get(name)
        if buffer.layout not in _COMPRESSED or not torch.is_tensor(saved):
            continue
        like = (saved.layout, saved.shape) == (buffer.layout, buffer.shape)
        if like and saved._nnz() != buffer._nnz():
            replace_buffer(module, buffer, saved.to(buffer.device, buffer.dtype, copy=True))


# ---------------------------------------------------------------- the first rank's on every rank


def broadcast_dense(tensor: torch.Tensor, grid: DataParallelGrid) -> None:
    """Copy a dense tensor of any dtype from the first data-parallel rank, as bytes."""
    if tensor.numel():
        data = tensor.resolve_conj().resolve_neg().contiguous()
        comm.broadcast(data.reshape(-1).view(torch.uint8), grid.source, group=grid.group)
        if data.data_ptr() != tensor.data_ptr() or tensor.is_conj() or tensor.is_neg():
            _fill(tensor, data)


def _fill(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Copy into a tensor several of whose elements may share memory (`expand`)."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor, data = tensor.narrow(dim, 0, 1), data.narrow(dim, 0, 1)
    tensor.copy_(data)


def _broadcast_sparse(module: nn.Module, buffer: torch.Tensor, grid: DataParallelGrid) -> None:
    """Ranks may store different numbers of elements."""
    pieces = _pieces(buffer)
    coalesced = buffer.layout == torch.sparse_coo and buffer.is_coalesced()
    about: list[Any] = [([tuple(piece.shape) for piece in pieces], coalesced)]
    comm.broadcast_object_list(about, grid.source, group=grid.group)
    shapes, first_coalesced = about[0]
    fits = shapes == [tuple(piece.shape) for piece in pieces] and coalesced == first_coalesced
    if not fits:
        pieces = [piece.new_empty(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    for piece in pieces:
        broadcast_dense(piece, grid)
    if not fits:
        set_buffer(module, buffer, _of_pieces(buffer, pieces, first_coalesced))


def _alike(module: nn.Module, grid: DataParallelGrid) -> set[str]:
    """Names of the buffers that have one layout, dtype and shape on all ranks; equal on all of them."""
    mine = [f"{name} {b.layout} {b.dtype} {tuple(b.shape)}" for name, b in names.buffers(module)]
    fingerprints = [""] * grid.size
    fingerprint = hashlib.sha256("\n".join(mine).encode()).hexdigest()
    comm.all_gather_object(fingerprints, fingerprint, group=grid.group)
    agreed = set(mine)
    if len(set(fingerprints)) > 1:
        everyone: list[list[str]] = [[]] * grid.size
        comm.all_gather_object(everyone, mine, group=grid.group)
        agreed = set.intersection(*map(set, everyone))
        differing = sorted({told.split(" ")[0] for ranks in everyone for told in ranks} - _names(agreed))
        log_dist(
            f"buffers that differ between ranks in shape, dtype or layout keep each rank's own values: "
            f"{', '.join(differing)}",
            ranks=[0],
            level=logging.WARNING,
        )
    return _names(agreed)


def _names(described: set[str]) -> set[str]:
    return {told.split(" ")[0] for told in described}


def broadcast_buffers(module: nn.Module, grid: DataParallelGrid) -> None:
    """Give every rank the buffers of the first data-parallel rank; those of rank-dependent shape are left alone.

    Raises:
        NotImplementedYetError: a buffer has a layout that is neither dense nor sparse.
    """
    alike = _alike(module, grid)
    for name, buffer in list(names.buffers(module)):
        if name not in alike:
            continue
        if is_dense(buffer):
            broadcast_dense(buffer, grid)
        elif buffer.layout in SPARSE:
            _broadcast_sparse(module, buffer, grid)
        else:
            raise NotImplementedYetError(
                f"buffer {name!r} of layout {buffer.layout}", "register it as a dense or sparse tensor"
            )
