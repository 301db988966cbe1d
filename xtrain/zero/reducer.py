"""When gradients are reduced: each bucket as soon as its last gradient has arrived.

Buckets are launched in one fixed order on every rank, whatever order gradients arrive in, so that
ranks never wait for each other in different collectives. Launching during backward happens only inside
the owning engine's `backward`; gradients that arrive otherwise (the script's own `loss.backward()`,
another engine's backward through shared parameters) wait for `step`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from xtrain import comm
from xtrain.base.errors import ConfigError, TrainingError
from xtrain.precision import LossScale, direct_backward
from xtrain.zero.flat import FlatGroup
from xtrain.zero.gather import Gatherer
from xtrain.zero.gradients import Gradients, Summing
from xtrain.zero.layout import Bucket
from xtrain.zero.param_group import ParamGroup

MAX_IN_FLIGHT = 4
"""Buckets of sharded gradients that may be on the wire at once; it bounds the transient memory."""

_hooks: Any = WeakIdKeyDictionary()
"""Parameter -> handle of its hook. Not an attribute of the parameter, which `torch.save(model)` would pickle."""


class _Pending:
    """One bucket in one window of accumulation.

    Attributes:
        position: place in the order of launching.
        arrivals: how often each member's gradient has arrived in the running backward. More than once
            happens with re-entrant checkpointing.
        expected: most arrivals of each member in any backward so far; 1 before the first.
        ever: members that have ever got a gradient.
        seen: members that got a gradient in this window.
        again: gradients came after it was launched (in the first backward only).
    """

    def __init__(
        self, gradients: Gradients, bucket: Bucket, last_arrival: int, param_group: ParamGroup | None
    ) -> None:
        self.gradients = gradients
        self.bucket = bucket
        self.last_arrival = last_arrival
        self.param_group = param_group
        self.position = 0
        self.arrivals: Counter[int] = Counter()
        self.expected: dict[int, int] = dict.fromkeys(bucket.members, 1)
        self.ever: set[int] = set()
        self.seen: set[int] = set()
        self.again = False
        self.handle: Summing | None = None

    def name(self, member: int) -> str:
        return self.gradients.group.names[member]

    @property
    def ready(self) -> bool:
        """Whether no more gradients will come in this backward, as far as can be known."""
        missing = [member for member, count in self.expected.items() if self.arrivals[member] < count]
        if not missing:
            return True
        # Unused parameters of stage 3 must not hold up the queue, or whole gradients would pile up.
        if self.param_group is None:
            return False
        if not self.param_group.ever_called:
            return True
        over = self.param_group.backward_ended and not self.param_group.calls
        return over and self.ever.isdisjoint(missing)

    def learn(self) -> None:
        """Close a backward: remember how often gradients arrived."""
        for member, count in self.arrivals.items():
            self.expected[member] = max(self.expected[member], count)
        self.ever.update(self.arrivals)
        self.arrivals.clear()

    def launch(self) -> None:
        self.handle = self.gradients.reduce(self.bucket)

    def complete(self) -> None:
        assert self.handle is not None
        self.gradients.complete(self.bucket, self.handle)
        self.handle = None


class GradientReducer:
    """Watches gradients arrive and averages the buckets over the data-parallel group.

    Args:
        gradients: those of every flat group.
        registration_order: parameter -> position in `module.parameters()`.
        every_backward: reduce after each backward (sharded gradients), not only at boundaries.
        overlap: launch during backward; otherwise when it has ended.
        loss_scaler: by what losses must be multiplied.
        before_reduction: called before each bucket is reduced, the first thing that other ranks get to see.
        on_discard: called when the gradients of a window are given up.
        gatherer: of the param groups of stage 3.

    Attributes:
        at_boundary: whether the running micro-batch is the last of its accumulation window; the engine says so.
        held: nothing is reduced, and gradients stay whole and local, until `release_held`.
    """

    def __init__(
        self,
        gradients: Sequence[Gradients],
        registration_order: dict[torch.nn.Parameter, int],
        every_backward: bool,
        overlap: bool,
        loss_scaler: LossScale,
        before_reduction: Callable[[], None] = lambda: None,
        on_discard: Callable[[], None] = lambda: None,
        gatherer: Gatherer | None = None,
    ) -> None:
        self.gradients = gradients
        self.at_boundary = self.held = False
        self.every_backward = every_backward
        self.overlap = overlap
        self.gatherer = gatherer
        self.loss_scaler = loss_scaler
        self._before_reduction, self._on_discard = before_reduction, on_discard
        param_groups: dict[tuple[FlatGroup, int], ParamGroup] = {}
        if gatherer is not None:
            param_groups = {
                (group, bucket.start): found
                for found in gatherer.param_groups
                for group, bucket in found.parts
            }
            gatherer.on_backward_end(self._launch_ready)
        pending = []
        for held in gradients:
            for bucket in held.group.layout.buckets:
                first = min(registration_order[held.group.members[member]] for member in bucket.members)
                pending.append(_Pending(held, bucket, first, param_groups.get((held.group, bucket.start))))
        # Backward reaches the first registered parameter last.
        self.queue = sorted(pending, key=lambda item: -item.last_arrival)
        for position, item in enumerate(self.queue):
            item.position = position
        self._next = 0  # the first bucket that has not been launched
        self._completed = 0  # the first bucket that has not been completed
        self._reduced = False  # whether this window's gradients have been reduced (unless every_backward)
        self._inside = False  # inside the engine's backward
        self._learned = False  # whether a whole backward has been watched
        self._open = False  # gradients have arrived since the last end of a micro-batch
        self._handles: dict[torch.nn.Parameter, Any] = {}
        self._hook_everything()

    def _hook_everything(self) -> None:
        for item in self.queue:
            for member in item.bucket.members:
                param = item.gradients.group.members[member]
                # A parameter belongs to the engine that was built last.
                if (old := _hooks.pop(param, None)) is not None:
                    old.remove()
                handle = param.register_post_accumulate_grad_hook(self._make_hook(item, member))
                _hooks[param] = self._handles[param] = handle

    def _make_hook(self, item: _Pending, member: int) -> Callable[[torch.Tensor], None]:
        # torch keeps hooks where Python's garbage collector does not look: a strong reference would keep an
        # engine that a script has dropped, and its states, for ever.
        owner, position = weakref.ref(self), item.position

        def on_gradient(_: torch.Tensor) -> None:
            if (reducer := owner()) is not None:
                if not reducer._inside:
                    reducer._check_scaled()
                reducer._arrived(reducer.queue[position], member)

        return on_gradient

    def come_last(self) -> None:
        """Put our hooks after those that a script has registered since, which may change the gradient."""
        for param, handle in self._handles.items():
            hooks: Any = param._post_accumulate_grad_hooks
            if next(reversed(hooks)) != handle.id:
                hooks[handle.id] = hooks.pop(handle.id)  # autograd does not see move_to_end

    def _check_scaled(self) -> None:
        """Refuse the gradients of a backward that is not ours and lacks the loss scale."""
        scale = self.loss_scaler
        if scale.needed and not direct_backward.is_scaled(scale.value):
            self.discard()
            raise TrainingError(
                "Loss scaling is required here (fp16), and a backward pass began without it: call "
                "engine.backward(loss), or engine.scale(loss).backward()"
            )

    def _arrived(self, item: _Pending, member: int) -> None:
        """The gradient of a member of the bucket is there."""
        if item.position < self._next and self._launches_at_once and not self._learned:
            item.again = True
        elif item.position < self._next or self._reduced:
            raise ConfigError(self._too_late(item.name(member)))
        if item.param_group is not None and not item.arrivals:
            self._complete_until(self._next)  # one param group's whole gradients at a time
        item.gradients.absorb(member, item.bucket)
        item.seen.add(member)
        item.arrivals[member] += 1
        self._open = True
        self._launch_ready()

    @property
    def _launches_at_once(self) -> bool:
        """Whether the first backward, which shows how often each gradient arrives, may launch already.

        Sharded gradients may: what comes late is reduced once more. In aligned mode they may not, because
        sums in two parts have other bits.
        """
        return self.every_backward and not any(held.aligned for held in self.gradients)

    def _launch_ready(self) -> None:
        watched = self._learned or self._launches_at_once
        if self._inside and self.overlap and watched and self._reducing():
            while self._next < len(self.queue) and self.queue[self._next].ready:
                self._launch_next()

    def _too_late(self, name: str) -> str:
        if self._reduced:
            return (
                f"a second backward of the same step reached parameter {name!r} after its gradients were reduced: "
                "use engine.backward(loss) for each of them, run all but the last inside `with engine.no_sync():`, or "
                "call engine.zero_grad() to discard the first"
            )
        return (
            f"parameter {name!r} got more gradients in one backward than ever before, after its bucket was "
            "reduced: set zero_optimization.overlap_comm to false for a model that changes so"
        )

    @property
    def ran_backward(self) -> bool:
        """Whether any gradient has arrived in this window."""
        return any(item.seen for item in self.queue)

    def _reducing(self) -> bool:
        return not self.held and (self.every_backward or self.at_boundary)

    def release_held(self) -> None:
        """Reduce, once, what several backwards have added up while `held` was set; clears it. Collective."""
        self.held = False
        if self.ran_backward and not self._reduced:
            self._reduce_all()

    def _launch_next(self) -> None:
        self._before_reduction()
        if self.every_backward:
            self._complete_until(self._next - MAX_IN_FLIGHT + 1)
        self.queue[self._next].launch()
        self._next += 1

    def _complete_until(self, position: int) -> None:
        while self._completed < position:
            self.queue[self._completed].complete()
            self._completed += 1

    def _reduce_all(self) -> None:
        """Reduce what has not been reduced (a missing gradient counts as zero) and wait for all of it."""
        while self._next < len(self.queue):
            self._launch_next()
        self._complete_until(self._next)
        self._next = self._completed = 0
        self._reduced = not self.every_backward

    def _reduce_again(self) -> None:
        """Reduce what came late in the first backward, on any rank."""
        held = self.gradients[0]
        late = torch.tensor([float(item.again) for item in self.queue], device=held.group.device)
        if held.world_size > 1:
            comm.all_reduce(late, comm.ReduceOp.MAX, group=held.process_group)
        for item, is_late in zip(self.queue, late.tolist(), strict=True):
            item.again = False
            if is_late:
                item.launch()
                item.complete()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around the engine's backward. If it raises, the window is given up."""
        self.come_last()
        if self._reduced:
            # A second backward in one window, of another loss: its gradients are reduced by themselves.
            for gradients in self.gradients:
                gradients.set_aside()
            self._reduced = False
        for item in self.queue:
            item.arrivals.clear()  # of backwards that were not this engine's
        self._inside = True
        try:
            yield
        except BaseException:
            self.discard()
            raise
        finally:
            self._inside = False
        self._end_of_micro_batch()

    def _end_of_micro_batch(self) -> None:
        if self.gatherer is not None:
            self.gatherer.order.end()
        for item in self.queue:
            item.learn()
        self._open = False
        if self._reducing():
            self._reduce_all()
            if self._launches_at_once and not self._learned and self.overlap:
                self._reduce_again()
        else:
            for gradients in self.gradients:
                gradients.close_micro_batch()
        self._learned = True
        if self.gatherer is not None:
            self.gatherer.end_iteration()

    def close_micro_batch(self) -> None:
        """Called by every `step()`: ends a micro-batch whose backward was the script's own."""
        if self._open:
            self._end_of_micro_batch()

    def adopt(self) -> bool:
        """Take over gradients that a script has assigned to `param.grad` itself; whether there are any."""
        for item in self.queue:
            for member in item.bucket.members:
                if item.gradients.is_foreign(member):
                    self._arrived(item, member)
        return self.ran_backward

    def settle(self) -> bool:
        """Whether this window's gradients are averaged over ranks, for who wants to read them before the step.

        Ends a micro-batch whose backward was the script's own, if that is when gradients are reduced.
        """
        if self._open and not self._inside and self._reducing():
            self.close_micro_batch()
        return self._reduced or (self.every_backward and self.ran_backward and not self.held)

    def reduce_rest(self) -> None:
        """Reduce what backward has left, because it did not know that the window ends."""
        if not (self._reduced or self.every_backward):
            self._reduce_all()

    def finish_window(self) -> list[str]:
        """Close an accumulation window before the update; names of parameters that got no gradient."""
        self.reduce_rest()
        unused = []
        for item in self.queue:
            unused += [item.name(member) for member in item.bucket.members if member not in item.seen]
            item.seen.clear()
        self._reduced = False
        return unused

    def reduce_for_step(self) -> None:
        """All that is needed before an update that the engine's `step` has not prepared."""
        self.close_micro_batch()
        self.finish_window()
        if self.gatherer is not None:
            self.gatherer.make_idle()

    def discard(self) -> None:
        """Give up a window and its gradients (zero_grad, a backward that raised, a checkpoint loaded)."""
        self._inside = False
        if self.gatherer is None or self.gatherer.order.broken is None:  # else some will never be complete
            for item in self.queue[self._completed : self._next]:
                item.complete()
        for item in self.queue:
            item.arrivals.clear()
            item.seen.clear()
            item.again = False
        if self.gatherer is not None and self.gatherer.hooks is not None:
            self.gatherer.hooks.abandon()
            self.gatherer.end_iteration()
        self._next = self._completed = 0
        self._reduced = self._open = False
        for gradients in self.gradients:
            gradients.zero()
        self._on_discard()

    def detach(self) -> None:
        """Remove the hooks, so that the parameters can be given to another engine."""
        for item in self.queue:
            for param in item.gradients.group.members:
                if (own := self._handles.pop(param, None)) is not None:
                    own.remove()
                    if _hooks.get(param) is own:  # not another engine's, which has taken the parameter over
                        del _hooks[param]
