"""Tensors as MPI buffers, and reductions as MPI operations. Does not communicate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from xtrain.errors import BackendError

_MOVE = {1: MPI.BYTE, 2: MPI.INT16_T, 4: MPI.INT32_T, 8: MPI.INT64_T, 16: MPI.C_DOUBLE_COMPLEX}
"""Element size in bytes: a type of that size, for moving elements whatever they are."""

_ADD = {
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint8: MPI.UINT8_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.bool: MPI.UINT8_T,
}

_Kind: Any = dist.ReduceOp.RedOpType  # torch's type stubs do not list its members
_OPERATIONS = {
    _Kind.SUM: MPI.SUM,
    _Kind.AVG: MPI.SUM,
    _Kind.PREMUL_SUM: MPI.SUM,
    _Kind.PRODUCT: MPI.PROD,
    _Kind.MIN: MPI.MIN,
    _Kind.MAX: MPI.MAX,
    _Kind.BAND: MPI.BAND,
    _Kind.BOR: MPI.BOR,
    _Kind.BXOR: MPI.BXOR,
}
# A truth value is a byte of 0 or 1, for which the sum is "or" and the product "and".
_TRUTH = {
    _Kind.SUM: MPI.BOR,
    _Kind.MAX: MPI.BOR,
    _Kind.BOR: MPI.BOR,
    _Kind.PRODUCT: MPI.BAND,
    _Kind.MIN: MPI.BAND,
    _Kind.BAND: MPI.BAND,
    _Kind.BXOR: MPI.BXOR,
}
_BITWISE = {_Kind.BAND, _Kind.BOR, _Kind.BXOR}
_ORDERED = {_Kind.MIN, _Kind.MAX}


def describe(tensors: Sequence[torch.Tensor]) -> str:
    """For messages: `float32[4, 2] (32 bytes)`."""
    size = sum(tensor.nbytes for tensor in tensors)
    if len(tensors) == 1:
        return f"{str(tensors[0].dtype).removeprefix('torch.')}{list(tensors[0].shape)} ({size} bytes)"
    return f"{len(tensors)} tensors ({size} bytes)"


def check(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The tensor without its history, if MPI can reach it.

    Raises:
        BackendError: it is sparse or not in host memory.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise BackendError(
            f"backend mpi: {what} was given a tensor of layout {tensor.layout} on {tensor.device}; "
            "it moves dense tensors in host memory: call .cpu() or .to_dense() first"
        )
    return tensor.detach()


def as_in_memory(tensor: torch.Tensor) -> bool:
    """Whether its memory holds exactly its elements in order (a conjugated view's does not)."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, in memory in order: the tensor itself where they are."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def spec(tensor: torch.Tensor, datatype: Any = None) -> list[Any]:
    """[buffer, count, type] over the memory of a contiguous tensor: no copy. Type None: for moving only."""
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return [memory, tensor.numel(), datatype or _MOVE[tensor.element_size()]]


def parts(tensor: torch.Tensor, counts: Sequence[int]) -> list[Any]:
    """[buffer, (counts, displacements), type]: consecutive pieces of `counts` elements, for moving only."""
    starts = [0]
    for count in counts[:-1]:
        starts.append(starts[-1] + count)
    memory = MPI.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)
    return [memory, (list(counts), starts), _MOVE[tensor.element_size()]]


def overlap(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two contiguous tensors share memory, which MPI forbids between a call's two buffers."""
    a, b = first.data_ptr(), second.data_ptr()
    return a < b + second.nbytes and b < a + first.nbytes


class Transfer:
    """The buffers of one call: what must stay alive while MPI works, and what is done with it afterwards."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.keep: list[torch.Tensor] = []
        self.after: list[Callable[[], Any]] = []

    def reading(self, tensor: torch.Tensor, apart_from: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous tensor to read from: itself where it is contiguous and clear of `apart_from`."""
        tensor = plain(check(tensor, self.what))
        if apart_from is not None and overlap(tensor, apart_from):
            tensor = tensor.clone()
        self.keep.append(tensor)
        return tensor

    def writing(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor to write into: itself, or one that is copied back afterwards."""
        tensor = check(tensor, self.what)
        if as_in_memory(tensor):
            self.keep.append(tensor)
            return tensor
        staged = plain(tensor)  # with its values: a message may be shorter than the place for it
        self.keep += [tensor, staged]
        self.after.append(lambda: tensor.copy_(staged))
        return staged

    def reading_list(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensors one after the other in one flat tensor; no copy where they lie so in memory."""
        return self.reading(_run_of(tensors) if _consecutive(tensors) else _flat(tensors, self.what))

    def writing_list(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """A flat tensor whose pieces end up in the tensors; no copy where they lie one after the other."""
        if _consecutive(tensors):
            return self.writing(_run_of(tensors))
        bare = [check(tensor, self.what) for tensor in tensors]
        flat = bare[0].new_empty(sum(tensor.numel() for tensor in bare))
        self.keep += [*bare, flat]

        def spread() -> None:
            for tensor, piece in zip(bare, flat.split([tensor.numel() for tensor in bare]), strict=True):
                tensor.copy_(piece.view(tensor.shape))

        self.after.append(spread)
        return flat


def _flat(tensors: Sequence[torch.Tensor], what: str) -> torch.Tensor:
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise BackendError(f"backend mpi: {what} was given tensors of different dtypes in one list")
    return torch.cat([check(tensor, what).reshape(-1) for tensor in tensors])


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


class Reduction:
    """One ReduceOp for one dtype: in which dtype and type MPI adds, what is done before and after.

    MPI has no sum of 16-bit and 8-bit floats that rounds once: those are added in fp32 and rounded at the end.

    Raises:
        BackendError: the operation is not defined for the dtype.
    """

    def __init__(self, op: Any, dtype: torch.dtype, size: int, what: str) -> None:
        kind = getattr(op, "op", op)
        table = _TRUTH if dtype == torch.bool else _OPERATIONS
        no_bits = kind in _BITWISE and (dtype.is_floating_point or dtype.is_complex)
        narrow = dtype.is_floating_point and dtype.itemsize < 4
        unknown = kind not in table or not (narrow or dtype in _ADD)
        if unknown or no_bits or (kind in _ORDERED and dtype.is_complex):
            raise BackendError(
                f"backend mpi: {what} has no {kind.name} of {str(dtype).removeprefix('torch.')}"
            )
        narrow = dtype.is_floating_point and dtype.itemsize < 4
        self.dtype = torch.float32 if narrow else dtype
        self.datatype = _ADD[self.dtype]
        self.mpi_op = table[kind]
        self._factor = op.factor if kind == _Kind.PREMUL_SUM else None
        self._divide = size if kind == _Kind.AVG else None

    @property
    def as_it_is(self) -> bool:
        """Whether inputs need no scaling before they are added."""
        return self._factor is None

    def prepare(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input as MPI adds it: in order, in the dtype of the sum, scaled; itself where nothing changes."""
        wide = plain(tensor).to(self.dtype)
        return wide if self._factor is None else wide * self._factor

    def complete(self, total: torch.Tensor) -> None:
        """Turn the sum into the result, in place."""
        if self._divide is not None:
            exact = total.is_floating_point() or total.is_complex()
            total.div_(self._divide, rounding_mode=None if exact else "trunc")
