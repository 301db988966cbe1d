"""torch's ReduceOps, taken apart for the process groups that add here or let MPI add."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

Kind: Any = dist.ReduceOp.RedOpType  # torch's type stubs do not list its members
BITWISE = {Kind.BAND, Kind.BOR, Kind.BXOR}
ORDERED = {Kind.MIN, Kind.MAX}


def kind_of(op: Any) -> Any:
    """SUM, MAX and so on."""
    return getattr(op, "op", op)


def scaling(op: Any, size: int) -> tuple[Any, int | None]:
    """What inputs are multiplied by, and what the sum of `size` of them is divided by; None: by nothing."""
    kind = kind_of(op)
    return op.factor if kind == Kind.PREMUL_SUM else None, size if kind == Kind.AVG else None


def divide(total: torch.Tensor, divisor: int | None) -> None:
    """Divide in place, whole numbers towards zero; None: not at all."""
    if divisor is not None:
        exact = total.is_floating_point() or total.is_complex()
        total.div_(divisor, rounding_mode=None if exact else "trunc")


def op_and_timeout(opts: Any, timeout: timedelta | None) -> tuple[Any, timedelta | None]:
    """From torch's options, or from a bare ReduceOp, which some of torch's signatures take in their place."""
    if opts is None:
        return dist.ReduceOp(dist.ReduceOp.SUM), timeout
    if hasattr(opts, "reduceOp"):
        return opts.reduceOp, opts.timeout
    return opts, timeout
