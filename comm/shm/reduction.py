"""Sums and other reductions of a few buffers, in the order of comm/deterministic.py's tree, without communication.

16-bit floats are added in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from xtrain.comm.reduce_op import BITWISE, ORDERED, Kind, divide, kind_of, scaling

_OPERATIONS: dict[Any, Callable[..., torch.Tensor]] = {
    Kind.SUM: torch.add,
    Kind.AVG: torch.add,
    Kind.PREMUL_SUM: torch.add,
    Kind.PRODUCT: torch.mul,
    Kind.MIN: torch.minimum,
    Kind.MAX: torch.maximum,
    Kind.BAND: torch.bitwise_and,
    Kind.BOR: torch.bitwise_or,
    Kind.BXOR: torch.bitwise_xor,
}

NARROW = (torch.float16, torch.bfloat16)
_EXACT = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64, *NARROW)
_COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*_FLOATS, *_EXACT, *_COMPLEX, torch.bool)

_scratch: dict[torch.dtype, list[torch.Tensor]] = {}
"""Shared by all reductions: progress.py does one thing at a time."""

_CHUNK = 2**15
"""Elements that are added in float32 at a time: the intermediate sums stay in the nearest cache."""


def has(op: Any, dtype: torch.dtype) -> bool:
    """Whether there is a way to reduce this dtype with this ReduceOp here."""
    kind = kind_of(op)
    if kind not in _OPERATIONS or dtype not in DTYPES:
        return False
    if kind in BITWISE:
        return dtype in _EXACT or dtype == torch.bool
    if kind in ORDERED:
        return dtype not in _COMPLEX
    return not (kind in (Kind.AVG, Kind.PREMUL_SUM) and dtype == torch.bool)


class Reduction:
    """One ReduceOp for one dtype and number of ranks.

    Args:
        op: for which `has` is true.
    """

    def __init__(self, op: Any, dtype: torch.dtype, size: int) -> None:
        kind = kind_of(op)
        self.code = list(_OPERATIONS).index(kind)
        self._function = _OPERATIONS[kind]
        self._factor, self._divisor = scaling(op, size)
        # torch adds two 16-bit floats in float32 and rounds once: a wide copy is for more than two, or for scaling.
        plain = size == 2 and self._factor is None and self._divisor is None
        self._wide = torch.float32 if dtype in NARROW and not plain else None

    def into(self, out: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        """Reduce flat tensors of equal length into `out`, which may be one of them."""
        if self._wide is None:
            self._into(out, rows)
            return
        for start in range(0, len(out), _CHUNK):
            self._into(out[start : start + _CHUNK], [row[start : start + _CHUNK] for row in rows])

    def _room(self, count: int, like: torch.Tensor) -> list[torch.Tensor]:
        """`count` scratch tensors as long as `like`."""
        dtype = self._wide or like.dtype
        found = _scratch.get(dtype, [])
        if len(found) < count or len(found[0]) < len(like):
            found = _scratch[dtype] = [torch.empty(len(like), dtype=dtype) for _ in range(count)]
        return [scratch[: len(like)] for scratch in found[:count]]

    def _into(self, out: torch.Tensor, rows: Sequence[torch.Tensor]) -> None:
        level = list(rows)
        if self._wide is not None or self._factor is not None:
            room = self._room(len(rows), out)
            level = [scratch.copy_(row) for scratch, row in zip(room, rows, strict=True)]
            if self._factor is not None:
                for row in level:
                    row.mul_(self._factor)
        else:
            room = self._room(len(rows) // 2, out) if len(rows) > 2 else []
        while len(level) > 2:
            # Scratch i is written from entries 2i and 2i + 1, which are never needed later.
            pairs = [
                self._function(level[i], level[i + 1], out=room[i // 2]) for i in range(0, len(level) - 1, 2)
            ]
            level = pairs + ([level[-1]] if len(level) % 2 else [])
        last = out if self._wide is None else room[0]
        if len(level) == 2:
            self._function(level[0], level[1], out=last)
        elif level[0].data_ptr() != last.data_ptr():
            last.copy_(level[0])
        divide(last, self._divisor)
        if last is not out:
            out.copy_(last)
