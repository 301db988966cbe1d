"""Backward passes that a script runs itself: `loss.backward()` and `engine.scale(loss).backward()`.

`engine.backward` divides the loss by the accumulation steps and multiplies it by the loss scale. Here is what makes
the gradients of other backward passes the same: they are divided where they enter what an engine has computed, and
one that lacks the loss scale is an error. Behaviour of deepspeed 0.19.8.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

_engines = 0
"""How many calls of `engine.backward` are running, of any engine."""

_scales: list[float] = []
"""The loss scales of the running backward passes."""


@contextmanager
def engine_backward(scale: float) -> Iterator[None]:
    """Around the differentiation of a loss that is divided already and multiplied by `scale`."""
    global _engines
    _engines += 1
    _scales.append(scale)
    try:
        yield
    finally:
        _engines -= 1
        _scales.remove(scale)


def mark_scaled(scaled: torch.Tensor, scale: float) -> None:
    """Let the backward pass that starts from `scaled`, or passes it, count as one with this loss scale."""

    def begin(_: torch.Tensor) -> None:
        _scales.append(scale)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _scales.remove(scale))

    scaled.register_hook(begin)


def is_scaled(scale: float) -> bool:
    """Whether the running backward pass started from a loss with this scale."""
    return scale in _scales


class _Entrance(torch.autograd.Function):
    """The identity; in a backward pass of the script's own, the gradient is divided.

    A tensor of its own, and not a hook on the output: outputs may depend on one another (a loss and its logits), and
    each way into the engine must divide once. `detach` because operations in place are forbidden on a view that a
    Function returns.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, divisor: int) -> torch.Tensor:
        ctx.divisor = divisor
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (gradient if _engines else gradient / ctx.divisor), None


def divide_gradients(outputs: Any, divisor: int) -> Any:
    """What a module returned, with tensors whose gradients are divided unless `engine.backward` runs.

    Args:
        outputs: tensors in tuples, lists, dictionaries, dataclasses and whatever else is registered with
            torch.utils._pytree, nested. Other objects are left as they are, as in DeepSpeed.
        divisor: the accumulation steps.
    """
    if (
        divisor == 1
        or not torch.is_grad_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return outputs
    entrances: dict[int, torch.Tensor] = {}

    def entrance(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad or tensor.grad_fn is None:
            return tensor
        if id(tensor) not in entrances:
            entrances[id(tensor)] = _Entrance.apply(tensor, divisor)
        return entrances[id(tensor)]

    return _replace_tensors(outputs, entrance)


def _replace_tensors(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor replaced; the same object when nothing has changed, else a copy."""
    if isinstance(value, torch.Tensor):
        return replace(value)
    leaves, structure = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return _replace_in_object(value, replace)
    replaced = [_replace_tensors(leaf, replace) for leaf in leaves]
    if all(new is old for new, old in zip(replaced, leaves, strict=True)):
        return value
    return tree_unflatten(replaced, structure)


def _replace_in_object(value: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same for classes of the script's own: subclasses of dict, list and tuple, and dataclasses."""
    if isinstance(value, tuple):
        items = tuple(_replace_tensors(item, replace) for item in value)
        same = all(new is old for new, old in zip(items, value, strict=True))
        return value if same else tuple.__new__(type(value), items)
    if isinstance(value, (dict, list)):
        entries = dict(value.items() if isinstance(value, dict) else enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        entries = {name: getattr(value, name) for name in names if hasattr(value, name)}
    else:
        return value
    changed = {}
    for key, old in entries.items():
        if (new := _replace_tensors(old, replace)) is not old:
            changed[key] = new
    if not changed:
        return value
    result = copy.copy(value)
    for key, new in changed.items():
        if isinstance(value, (dict, list)):
            result[key] = new
        else:
            object.__setattr__(result, key, new)  # the dataclass may be frozen
    return result
