"""A neighbour computes a micro-batch again and compares bits: the corruption check that sees wrong arithmetic.

When it happens, and what follows from a mismatch, is in corruption_check.py.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from xtrain import comm
from xtrain.base.errors import NotImplementedYetError
from xtrain.engine.hooks import Hooks
from xtrain.integrity.checksum import checksum
from xtrain.precision import autocast_region
from xtrain.reproducible.aligned_random import AlignedRandom
from xtrain.zero import names
from xtrain.zero.train_state import TrainState


@dataclass
class Taken:
    """One micro-batch of this rank.

    Attributes:
        place: (step, slot), which its dropout masks depend on.
        inputs: (positional, by name), as the module got them.
        outputs: checksums of the floating-point tensors that the module returned.
        seeds: for each of them the gradient that arrived there; None where none did.
        gradients: checksums by parameter, as they arrived, before they are added to others.
    """

    place: tuple[int, int]
    inputs: Any
    outputs: list[int] = field(default_factory=list)
    seeds: list[torch.Tensor | None] = field(default_factory=list)
    gradients: dict[str, Any] = field(default_factory=dict)


def _floating(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of what a module returns, in order."""
    return [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _fresh(value: Any) -> Any:
    """A copy of a tensor: what kernels round may depend on where data begins, and a received tensor begins a buffer."""
    plain = isinstance(value, torch.Tensor) and not value.requires_grad
    return value.clone(memory_format=torch.contiguous_format) if plain else value


class Recompute:
    """Keeps the first micro-batch of a step that is to be checked, and lets the rank before compute it again.

    Args:
        due: whether the step of that number is checked.

    Raises:
        NotImplementedYetError: ranks hold parts of the model or of a sample.
    """

    def __init__(self, state: TrainState, hooks: Hooks, due: Callable[[int], bool]) -> None:
        if state.grid.model.size > 1 or state.grid.sequence > 1:
            raise NotImplementedYetError(
                "config key 'xtrain.sdc_check.recompute' with model or sequence parallelism",
                "leave the key out",
            )
        self._state = state
        self._due = due
        self._taken: Taken | None = None
        self._running: Taken | None = None
        self._handles: list[Any] = []
        self._names = {p: name for name, p in names.parameters(state.module) if p.requires_grad}
        hooks.before_forward.append(self._before_forward)
        hooks.after_forward.append(self._after_forward)
        hooks.on_destroy.append(lambda _: self.forget())

    def _before_forward(self, state: TrainState, args: Any, kwargs: Any) -> Any:
        """Keep the inputs; those that the model then gets begin in memory of their own."""
        if not self._wanted():
            return None
        args, kwargs = tree_map(_fresh, (args, kwargs))
        # The module may change what it is given.
        inputs = tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, (args, kwargs))
        self._taken = self._running = Taken(state.place(), inputs)
        return args, kwargs

    def _after_forward(self, _: TrainState, outputs: Any) -> None:
        if self._running is not None:
            self._watch(self._running, _floating(outputs))
            self._running = None

    def _wanted(self) -> bool:
        state = self._state
        return (
            self._taken is None
            and torch.is_grad_enabled()
            and state.module.training
            and state.in_window == 0
            and self._due(state.counters.global_steps + 1)
        )

    def _watch(self, taken: Taken, outputs: list[torch.Tensor]) -> None:
        """Note what the module returned, and what arrives in the micro-batch's backward pass."""
        taken.outputs = [int(checksum(tensor)) for tensor in outputs]
        taken.seeds = [None] * len(outputs)

        def seed(number: int) -> Callable[[torch.Tensor], None]:
            def hook(grad: torch.Tensor) -> None:
                if taken.seeds[number] is None:
                    taken.seeds[number] = grad.detach().clone()

            return hook

        def gradient(name: str) -> Callable[[torch.Tensor], None]:
            def hook(grad: torch.Tensor) -> None:
                if name not in taken.gradients:  # later ones are other micro-batches'
                    taken.gradients[name] = checksum(grad)

            return hook

        for number, tensor in enumerate(outputs):
            if tensor.requires_grad:
                self._handles.append(tensor.register_hook(seed(number)))
        self._handles += [param.register_hook(gradient(name)) for param, name in self._names.items()]

    def forget(self) -> None:
        """Drop what was kept: the step is over, or given up."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._taken = None

    def check(self) -> tuple[int, str] | None:
        """Compute the neighbour's micro-batch again; every rank of the data-parallel group calls.

        Returns:
            (global rank of the neighbour, what differs from what it has computed), or None.
        """
        taken = self._taken
        self.forget()
        if taken is not None:
            taken.gradients = {name: int(value) for name, value in taken.gradients.items()}
        neighbour, theirs = self._exchange(taken)
        if theirs is None:
            return None  # it has run no training forward pass through its engine
        difference = self._differs(theirs)
        return None if difference is None else (neighbour, difference)

    def _exchange(self, taken: Taken | None) -> tuple[int, Taken | None]:
        """Send what was kept to the rank before; (global rank of the one behind, what it has sent)."""
        grid, device = self._state.grid, self._state.device
        host = tree_map(
            lambda v: v.cpu() if isinstance(v, torch.Tensor) else v, vars(taken) if taken else None
        )
        data = pickle.dumps(host)
        if grid.size > 1:
            before, behind = ((grid.rank + way) % grid.size for way in (-1, 1))
            if grid.group is not None:
                before, behind = (comm.get_global_rank(grid.group, rank) for rank in (before, behind))
            words = torch.frombuffer(bytearray(data + bytes(-len(data) % 8)), dtype=torch.int64).to(device)
            size = torch.tensor([len(data)], dtype=torch.int64, device=device)
            theirs = torch.empty_like(size)
            self._swap(size, before, theirs, behind, grid.group)
            received = torch.empty(-(-int(theirs) // 8), dtype=torch.int64, device=device)
            self._swap(words, before, received, behind, grid.group)
            data = received.cpu().numpy().tobytes()[: int(theirs)]
        else:
            behind = self._state.global_rank
        found = pickle.loads(data)  # from a rank of this run, as with all_gather_object
        if found is None:
            return behind, None
        found = tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, found)
        return behind, Taken(**{**found, "place": tuple(found["place"])})

    @staticmethod
    def _swap(sent: torch.Tensor, to: int, received: torch.Tensor, source: int, group: Any) -> None:
        operations = [
            comm.P2POp(comm.isend, sent, to, group),
            comm.P2POp(comm.irecv, received, source, group),
        ]
        for work in comm.batch_isend_irecv(operations):
            work.wait()

    def _differs(self, theirs: Taken) -> str | None:
        """What another rank's micro-batch gives here and did not give there; None when all bits agree."""
        module, values = self._state.module, self._state.values
        kept = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
        try:
            with (
                torch.enable_grad(),
                AlignedRandom(values.xtrain.seed, lambda: theirs.place),
                autocast_region(values.torch_autocast, self._state.device.type),
            ):
                args, kwargs = tree_map(_fresh, theirs.inputs)
                outputs = _floating(module(*args, **kwargs))
            if [int(checksum(tensor)) for tensor in outputs] != theirs.outputs:
                return "another output of the forward pass"
            return self._gradients_differ(outputs, theirs)
        finally:
            with torch.no_grad():
                for buffer, before in kept:
                    buffer.copy_(before)

    def _gradients_differ(self, outputs: list[torch.Tensor], theirs: Taken) -> str | None:
        used = [(t, seed) for t, seed in zip(outputs, theirs.seeds, strict=True) if seed is not None]
        if not used:
            return None
        try:
            grads = torch.autograd.grad(
                [tensor for tensor, _ in used],
                list(self._names),
                [seed for _, seed in used],
                allow_unused=True,
            )
        except RuntimeError as error:
            if "incompatible with .grad()" not in str(error):
                raise
            raise NotImplementedYetError(
                "config key 'xtrain.sdc_check.recompute' with re-entrant activation checkpointing",
                "checkpoint with use_reentrant=False",
            ) from None
        mine = {
            name: int(checksum(grad))
            for name, grad in zip(self._names.values(), grads, strict=True)
            if grad is not None
        }
        wrong = [name for name in self._names.values() if mine.get(name) != theirs.gradients.get(name)]
        if not wrong:
            return None
        more = f" (and of {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"another gradient of parameter {wrong[0]!r}{more}"
