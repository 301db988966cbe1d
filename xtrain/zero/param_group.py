"""The param groups of ZeRO stage 3: which parameters are gathered and released together, and moving them.

When that happens is decided in gather.py.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xtrain.base.errors import NotImplementedYetError
from xtrain.zero.home import full_shape
from xtrain.zero.layout import Bucket
from xtrain.zero.order import GatherOrder
from xtrain.zero.shards import ShardedGroup

MAX_ELEMENTS = 250_000_000
"""A larger module is divided into its children, down to single layers."""
MIN_BLOCKS = 8
"""A module that has lists of blocks itself is one group only if it is at most this part of the model."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class ParamGroup:
    """Parameters that ZeRO stage 3 gathers and releases together (FSDP2's word), and who needs them.

    Args:
        name: of the module.
        module: whose parameters, or whose descendants', they are; while it runs they are whole. Held weakly: a
            parameter leads here, and must not keep alive the model (see `ForwardCall`).
        params: the parameters.

    Attributes:
        parts: the buckets that hold them.
        number: place among the gatherer's groups.
        users: how many uses are going on; the parameters are whole while there is one.
        calls: forward calls that used the unit and whose backward has not ended.
        ever_called: whether any forward has used it.
        backward_ended: whether the backward of some call has ended in the running backward.
    """

    def __init__(self, name: str, module: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self.name = name
        self.params = tuple(params)
        self.parts: list[tuple[ShardedGroup, Bucket]] = []
        self._module = weakref.ref(module)
        self.users = 0
        self.whole = False
        self.calls: weakref.WeakSet[Any] = weakref.WeakSet()
        self.ever_called = False
        self.backward_ended = False
        self.number = 0
        self._works: list[Any] | None = None
        self._announced: Any = None

    @property
    def module(self) -> nn.Module | None:
        """The module, while it is there."""
        return self._module()

    @property
    def elements(self) -> int:
        """Elements of its buckets, padding included."""
        return sum(bucket.stop - bucket.start for _, bucket in self.parts)

    @property
    def device(self) -> torch.device:
        """Where its parameters are used."""
        return self.parts[0][0].device

    @property
    def launched(self) -> bool:
        """Whether memory is in use for it."""
        return self.whole or self._works is not None

    @property
    def lent(self) -> bool:
        """Whether some of its parameters have been gathered without the others, for a script."""
        return any(
            member in group.lent for group, bucket in self.parts if group.lent for member in bucket.members
        )

    def launch(self, process_group: dist.ProcessGroup | None, order: GatherOrder) -> None:
        """Start gathering, unless that has been done."""
        if not self.launched:
            if torch._C._functorch.peek_interpreter_stack() is not None:
                raise NotImplementedYetError(
                    "torch.func over a model of ZeRO stage 3",
                    "wrap the call in zero.GatheredParameters(model.parameters()), or use stage 2",
                )
            with order.explained():
                self._announced = order.announce(self.number)
                self._works = [
                    group.launch(bucket, process_group, self.number) for group, bucket in self.parts
                ]

    def wait(self, order: GatherOrder) -> None:
        """Wait for `launch`; afterwards the parameters are whole."""
        if self._works is not None:
            with order.explained():
                order.compare(self._announced)
                for work in self._works:
                    if work is not None:
                        work.wait()
            self._works = self._announced = None
            for group, bucket in self.parts:
                group.attach(bucket)
            self.whole = True

    def release(self, order: GatherOrder) -> None:
        """Give the memory back."""
        if self._works is not None and order.broken is not None:
            return  # what is on its way may never come, and would be written into this memory
        self.wait(order)
        if self.whole:
            for group, bucket in self.parts:
                group.release(bucket)
            self.whole = False


class _Divider:
    def __init__(self, root: nn.Module, wanted: Collection[nn.Parameter]) -> None:
        self._left = dict.fromkeys(param for param in root.parameters() if param in wanted)
        self._total = sum(full_shape(param).numel() for param in self._left)
        self.groups: list[ParamGroup] = []

    def _take(self, name: str, module: nn.Module, recurse: bool) -> None:
        """A parameter that several modules share belongs to the first of them."""
        params = tuple(p for p in module.parameters(recurse) if p in self._left)
        for param in params:
            del self._left[param]
        if params:
            self.groups.append(ParamGroup(name, module, params))

    def _is_one(self, module: nn.Module, is_block: bool) -> bool:
        size = sum(full_shape(param).numel() for param in module.parameters() if param in self._left)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or size > MAX_ELEMENTS:
            return False
        has_lists = any(isinstance(child, _CONTAINERS) for child in module.modules())
        return not has_lists or (is_block and size * MIN_BLOCKS <= self._total)

    def walk(self, name: str, module: nn.Module, is_block: bool) -> None:
        leaf = getattr(module, "_z3_leaf", False)
        if leaf or (name and self._is_one(module, is_block)):
            self._take(name, module, recurse=True)
            return
        self._take(name, module, recurse=False)
        for child_name, child in module.named_children():
            inside = f"{name}.{child_name}" if name else child_name
            self.walk(inside, child, isinstance(module, _CONTAINERS))


def divide(root: nn.Module, wanted: Collection[nn.Parameter]) -> list[ParamGroup]:
    """The param groups of a model, in order of registration; each wanted parameter is in one of them.

    Elements of lists (`ModuleList`, `Sequential`), which is what the blocks of a model are, make one
    group each unless they are large; outside of lists every subtree without lists makes one, and what a
    module with children holds itself. A module marked as a leaf (`utils.set_z3_leaf_modules`) is never
    divided.

    Args:
        wanted: the parameters to divide; others are ignored.
    """
    divider = _Divider(root, wanted)
    divider.walk("", root, False)
    return divider.groups
