"""What the checks of the MPI process group share: the list of checks, inputs of every rank, definitions of the sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Kind = dist.ReduceOp

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64]
COMPLEX = [torch.complex64, torch.complex128]


Check = Callable[[int, int], Any]
"""A check: called with rank and number of ranks on every rank, at the same time."""


def listed_in(checks: dict[str, Check]) -> Callable[[Check], Check]:
    """A decorator that puts checks into a module's list, in the order of the file."""

    def put(function: Check) -> Check:
        checks[function.__name__] = function
        return function

    return put


def values(
    rank: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (6, 5), seed: int = 0
) -> Any:
    """The inputs of a rank: any rank can compute any other's."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype in INTEGERS:
        return torch.randint(1, 4, shape, generator=generator).to(dtype)
    if dtype.is_complex:
        return torch.complex(
            *(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in "ri")
        ).to(dtype)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def same(found: torch.Tensor, expected: torch.Tensor, exact: bool = True) -> None:
    if exact:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(found, expected)


def reduced(inputs: list[torch.Tensor], op: Any) -> torch.Tensor:
    """What a reduction means: in fp32 and one rounding where the dtype is narrower."""
    dtype = inputs[0].dtype
    narrow = dtype in (torch.float16, torch.bfloat16)
    stack = torch.stack([tensor.float() if narrow else tensor for tensor in inputs])
    n = len(inputs)
    if dtype == torch.bool:
        odd = stack.sum(0) % 2 == 1
        some = {Kind.SUM, Kind.MAX, Kind.BOR}
        return stack.any(0) if op in some else odd if op == Kind.BXOR else stack.all(0)
    total = stack[0].clone()
    for row in stack[1:]:
        if op in (Kind.SUM, Kind.AVG):
            total = total + row
        elif op == Kind.PRODUCT:
            total = total * row
        elif op == Kind.MIN:
            total = torch.minimum(total, row)
        elif op == Kind.MAX:
            total = torch.maximum(total, row)
        else:
            total = {
                Kind.BAND: torch.bitwise_and,
                Kind.BOR: torch.bitwise_or,
                Kind.BXOR: torch.bitwise_xor,
            }[op](total, row)
    if op == Kind.AVG:
        whole = dtype in INTEGERS
        total = torch.div(total, n, rounding_mode="trunc" if whole else None)
    return total.to(dtype)
