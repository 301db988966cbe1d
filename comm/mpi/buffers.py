"""Tensors as MPI buffers, and reductions as MPI operations. Does not communicate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from xtrain.base.errors import BackendError
from xtrain.comm import transfer
from xtrain.comm.transfer import plain

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


class Transfer(transfer.Transfer):
    """The buffers of one MPI call."""

    backend = "mpi"


def check(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The tensor without its history, if MPI can reach it.

    Raises:
        BackendError: it is sparse or not in host memory.
    """
    return transfer.check(tensor, what, Transfer.backend)


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


def told(what: str, tensors: Sequence[torch.Tensor], detail: str = "", sizes: bool = True) -> str:
    """A call in words, the same on all ranks that make the same call.

    Args:
        detail: which reduction, which root.
        sizes: whether the tensors have the same sizes on all ranks.
    """
    dtypes = " and ".join({str(tensor.dtype).removeprefix("torch."): None for tensor in tensors})
    counts = [tensor.numel() for tensor in tensors]
    of = f" of {counts[0] if len(counts) == 1 else counts} elements" if sizes else ""
    about = f"{dtypes}{of}{', ' if detail and dtypes else ''}{detail}"
    return f"{what} ({about})" if about else what


def name_of(op: Any) -> str:
    """SUM, MAX and so on."""
    return str(getattr(op, "op", op).name)


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
