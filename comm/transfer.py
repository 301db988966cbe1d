"""Tensors as buffers of a library that moves host memory: in order, kept alive, copied back. Does not communicate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xtrain.base.errors import BackendError


def describe(tensors: Sequence[torch.Tensor]) -> str:
    """For messages: `float32[4, 2] (32 bytes)`."""
    size = sum(tensor.nbytes for tensor in tensors)
    if len(tensors) == 1:
        return f"{str(tensors[0].dtype).removeprefix('torch.')}{list(tensors[0].shape)} ({size} bytes)"
    return f"{len(tensors)} tensors ({size} bytes)"


def check(tensor: torch.Tensor, what: str, backend: str) -> torch.Tensor:
    """The tensor without its history, if a library of host memory can reach it.

    Raises:
        BackendError: it is sparse or not in host memory.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise BackendError(
            f"backend {backend}: {what} was given a tensor of layout {tensor.layout} on {tensor.device}; "
            "it moves dense tensors in host memory: call .cpu() or .to_dense() first"
        )
    return tensor.detach()


def as_in_memory(tensor: torch.Tensor) -> bool:
    """Whether its memory holds exactly its elements in order (a conjugated view's does not)."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, in memory in order: the tensor itself where they are."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two contiguous tensors share memory, so that one of them must be copied."""
    a, b = first.data_ptr(), second.data_ptr()
    return a < b + second.nbytes and b < a + first.nbytes


class Transfer:
    """The buffers of one call: what must stay alive meanwhile, and what is done with it afterwards."""

    backend = "host"

    def __init__(self, what: str) -> None:
        self.what = what
        self.keep: list[torch.Tensor] = []
        self.after: list[Callable[[], Any]] = []

    def reading(self, tensor: torch.Tensor, apart_from: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous tensor to read from: itself where it is contiguous and clear of `apart_from`."""
        tensor = plain(check(tensor, self.what, self.backend))
        if apart_from is not None and overlap(tensor, apart_from):
            tensor = tensor.clone()
        self.keep.append(tensor)
        return tensor

    def writing(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor to write into: itself, or one that is copied back afterwards."""
        tensor = check(tensor, self.what, self.backend)
        if as_in_memory(tensor):
            self.keep.append(tensor)
            return tensor
        staged = plain(tensor)  # with its values: a message may be shorter than the place for it
        self.keep += [tensor, staged]
        self.after.append(lambda: tensor.copy_(staged))
        return staged

    def reading_list(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensors one after the other in one flat tensor; no copy where they lie so in memory."""
        return self.reading(_run_of(tensors) if _consecutive(tensors) else self._flat(tensors))

    def writing_list(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A flat tensor whose pieces end up in the tensors; no copy where they lie one after the other."""
        if _consecutive(tensors):
            return self.writing(_run_of(tensors))
        bare = [check(tensor, self.what, self.backend) for tensor in tensors]
        flat = bare[0].new_empty(sum(tensor.numel() for tensor in bare))
        self.keep += [*bare, flat]

        def spread() -> None:
            for tensor, piece in zip(bare, flat.split([tensor.numel() for tensor in bare]), strict=True):
                tensor.copy_(piece.view(tensor.shape))

        self.after.append(spread)
        return flat

    def _flat(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise BackendError(
                f"backend {self.backend}: {self.what} was given tensors of different dtypes in one list"
            )
        return torch.cat([check(tensor, self.what, self.backend).reshape(-1) for tensor in tensors])


def _consecutive(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the tensors are contiguous pieces of one storage without gaps, in this order."""
    place = tensors[0].data_ptr()
    storage = tensors[0].untyped_storage().data_ptr()
    for tensor in tensors:
        same = tensor.dtype == tensors[0].dtype and tensor.untyped_storage().data_ptr() == storage
        if not (same and as_in_memory(tensor) and tensor.data_ptr() == place):
            return False
        place += tensor.nbytes
    return True


def _run_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    first, count = tensors[0].detach(), sum(tensor.numel() for tensor in tensors)
    return first.as_strided((count,), (1,), first.storage_offset())
