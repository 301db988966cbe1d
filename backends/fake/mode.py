"""Puts the emulated operators in the place of the host's, forward and backward, and takes them away again.

A TorchDispatchMode sees each operator below autograd. torch runs backward on the host in the thread that asked for
it, with that thread's modes. See docs/decisions/0007-fake-backend.md for what else was tried.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from xtrain.backends.fake.cost import Clock
from xtrain.backends.fake.operators import FUSED, OPERATORS, Arithmetic, HostArithmetic, Operator
from xtrain.backends.fake.profiles import Costs, Numerics
from xtrain.backends.fake.rounding import flush_, saturate_
from xtrain.base.errors import NotImplementedYetError

_MOVES = frozenset(
    """
    alias_copy as_strided_scatter bernoulli cat clone constant_pad_nd contiguous embedding empty empty_like
    empty_strided fill flip full full_like gather index index_put index_select lift_fresh masked_fill masked_scatter
    new_empty new_empty_strided new_full new_ones new_zeros normal ones ones_like rand rand_like randn randn_like repeat
    resize roll scatter select_scatter set slice_scatter stack uniform where zero zeros zeros_like
    """.split()  # noqa: SIM905
)
"""Operators that compute nothing: what they write was there before, or the script has asked for it."""

_COPY = torch.ops.aten.copy_.default


@dataclass(frozen=True)
class Plan:
    """What to do with one operator."""

    operator: Operator | None
    finish: bool
    """Whether its results are an arithmetic unit's, which flushes or saturates."""
    refused: bool
    has_out: bool
    writes: tuple[int, ...] = ()
    """Positions of the arguments that it changes, where it returns nothing (operators on lists, fused optimizers)."""


def _plan(func: Any) -> Plan:
    packet = func._overloadpacket
    name = packet.__name__
    if func.namespace != "aten":
        return Plan(None, False, False, False)
    schema = func._schema
    has_out = any(argument.is_out for argument in schema.arguments)
    operator = OPERATORS.get(func)
    if has_out and operator is None:
        # mm.out is mm.default with a place for the result; IntList_out is dim_IntList's.
        overload = {"IntList_out": "dim_IntList", "correction_out": "correction"}.get(func._overloadname)
        operator = OPERATORS.get(getattr(packet, overload or "default", None))
    finish = not func.is_view and name.rstrip("_") not in _MOVES
    changed = tuple(
        place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return Plan(operator, finish, name in FUSED, has_out, () if schema.returns else changed)


class EmulatedOperators(TorchDispatchMode):
    """The operators of one chip, while it is active. Inactive, it passes everything on."""

    def __init__(self) -> None:
        super().__init__()
        self.arithmetic: Arithmetic | None = None
        self.clock: Clock | None = None
        self.overflowed = False
        self._plans: dict[Any, Plan] = {}

    def activate(self, numerics: Numerics, exact: bool, clock: Clock | None) -> None:
        """Compute as `numerics` says from now on, and let `clock` count what it takes."""
        self.arithmetic = Arithmetic(numerics, exact) if numerics.reaches_operators else None
        self.clock = clock
        self.overflowed = False

    def deactivate(self) -> None:
        """Let the host compute."""
        self.arithmetic = self.clock = None

    @property
    def active(self) -> bool:
        """Whether anything is emulated or counted."""
        return self.arithmetic is not None or self.clock is not None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if any(kind is not torch.Tensor and kind is not torch.nn.Parameter for kind in types):
            return NotImplemented  # a subclass: what it is made of comes here again
        plan = self._plans.get(func)
        if plan is None:
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
                with self:  # inference mode does not take operators apart
                    return func.decompose(*args, **kwargs)
            plan = self._plans[func] = _plan(func)
        result = self._compute(func, plan, args, kwargs)
        if self.clock is not None:
            self.clock.operator(func, args, kwargs, result)
        return result

    def _compute(self, func: Any, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arithmetic = self.arithmetic
        if arithmetic is None:
            return func(*args, **kwargs)
        if plan.refused and arithmetic.changes_products:
            raise NotImplementedYetError(
                f"{func._overloadpacket.__name__} on backend 'fake'", "write it with matmul and softmax"
            )
        result: Any = NotImplemented
        if plan.operator is not None:
            given = {key: value for key, value in kwargs.items() if key != "out"} if plan.has_out else kwargs
            with suppress(HostArithmetic):
                result = plan.operator(arithmetic, *args, **given)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        elif plan.has_out:
            result = kwargs["out"].resize_(result.shape).copy_(result)
        if plan.finish and (arithmetic.numerics.flush_denormals or arithmetic.numerics.saturate):
            if func is not _COPY or args[0].dtype != args[1].dtype:  # a copy converts, or computes nothing
                self._finish(arithmetic.numerics, result)
            for place in plan.writes:
                self._finish(arithmetic.numerics, args[place] if place < len(args) else None)
        return result

    def _finish(self, numerics: Numerics, result: Any) -> None:
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or not tensor.numel():
                continue
            if tensor.device.type != "cpu" or tensor.layout != torch.strided:
                continue
            if numerics.flush_denormals and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
                flush_(tensor)
            if numerics.saturate and tensor.dtype == torch.float16:
                self.overflowed |= saturate_(tensor)


_mode = EmulatedOperators()
_entered = threading.local()
_flags: dict[str, bool] = {}
"""torch's switches for fused attention as they were before; empty while nothing is emulated."""
os.register_at_fork(after_in_child=_mode.deactivate)  # a loader's workers compute on the host


def mode() -> EmulatedOperators:
    """The process's only mode."""
    return _mode


def _fused_attention(enabled: bool | None) -> None:
    """Switch fused attention off (its products are hidden inside), or back to what it was (None)."""
    backends = torch.backends.cuda
    if enabled is None:
        if _flags:
            backends.enable_flash_sdp(_flags.pop("flash"))
            backends.enable_math_sdp(_flags.pop("math"))
        return
    if not _flags:
        _flags.update(flash=backends.flash_sdp_enabled(), math=backends.math_sdp_enabled())
    backends.enable_flash_sdp(enabled)
    backends.enable_math_sdp(True)


def switch_on(numerics: Numerics, exact: bool = False, costs: Costs | None = None) -> None:
    """Let this thread, and the backward passes that it starts, compute as the chip does.

    Args:
        exact: float32 products are exact where the chip can switch that.
        costs: count what operators and messages would take there.
    """
    clock = _mode.clock
    if costs is None:
        clock = None
    elif clock is None or clock.costs != costs:
        clock = Clock(costs)
    _mode.activate(numerics, exact, clock)
    _fused_attention(None)
    if not _mode.active:
        _leave()
        return
    if _mode.arithmetic is not None:
        _fused_attention(enabled=False)
    if not getattr(_entered, "here", False):
        _mode.__enter__()
        _entered.here = True


def switch_off() -> None:
    """Let the host compute again, with everything as it was."""
    _mode.deactivate()
    _fused_attention(None)
    _leave()


def _leave() -> None:
    """Take the mode from this thread's stack, if it is on top of it; below others it stays, inactive."""
    stack = _get_current_dispatch_mode_stack()
    if getattr(_entered, "here", False) and stack and stack[-1] is _mode:
        _mode.__exit__(None, None, None)
        _entered.here = False


@contextmanager
def switched(
    numerics: Numerics, exact: bool = False, costs: Costs | None = None
) -> Iterator[EmulatedOperators]:
    """A context in which the chip computes; afterwards what was before."""
    before = _mode.arithmetic, _mode.clock
    switch_on(numerics, exact, costs)
    try:
        yield _mode
    finally:
        if before == (None, None):
            switch_off()
        else:
            _mode.arithmetic, _mode.clock = before
            _fused_attention(enabled=False if before[0] is not None else None)
