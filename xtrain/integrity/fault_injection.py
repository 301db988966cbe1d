"""The engine's side of the backend "fake": faults at their steps, modelled times.

The backend itself (backends/fake) knows no engine. On any other backend nothing here does anything.
"""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xtrain import comm
from xtrain.backends import EmulatingBackend
from xtrain.backends.fake.faults import damage_
from xtrain.base.errors import ConfigError, PeerLostError, unknown_name
from xtrain.base.log import log_dist
from xtrain.comm import timeouts
from xtrain.config import backend as backends_in_use
from xtrain.config.fake import FaultConfig
from xtrain.engine.hooks import Hooks
from xtrain.zero import names
from xtrain.zero.home import full_shape
from xtrain.zero.shards import ShardedGroup
from xtrain.zero.train_state import TrainState


def attach(state: TrainState, hooks: Hooks) -> None:
    """Let an engine on a backend that emulates have its faults and its modelled clock, and tell what is emulated."""
    backend = state.backend
    if not isinstance(backend, EmulatingBackend):
        return
    section = state.values.xtrain.fake
    described = backend.describe()
    shown = ", ".join(f"{name} {entry['value']}" for name, entry in described["numerics"].items())
    log_dist(
        f"backend {backend.name!r} emulates {described['profile']!r} on the host ({shown or 'host arithmetic'}): "
        "nothing here has run on that chip",
        ranks=[0],
    )
    backends_in_use.emulated.add(state)
    hooks.on_destroy.append(detach)
    messages = comm.ledger.listener
    if not isinstance(messages, Messages):  # else it is that of another engine, which goes on
        messages = comm.ledger.listener = Messages(backend, state.global_rank)
    if section is not None and section.faults:
        Faults(state, hooks, section.faults, messages)


def detach(state: TrainState) -> None:
    """The engine is gone; with the last one, the host computes again."""
    backends_in_use.emulated.discard(state)
    if isinstance(state.backend, EmulatingBackend) and not backends_in_use.emulated:
        comm.ledger.listener = None
        state.backend.release()


class Messages:
    """Hears of each collective before it starts: counts its modelled time, and loses those that are to be lost."""

    def __init__(self, backend: EmulatingBackend, rank: int) -> None:
        self._backend = backend
        self._rank = rank
        self._lost: list[tuple[FaultConfig, Callable[[], int]]] = []
        self._seen: dict[int, int] = {}
        """Collectives since the step began in which a message is to be lost, by place in `_lost`."""

    def lose(self, fault: FaultConfig, step: Callable[[], int]) -> None:
        """Lose a message of the step that the fault names; `step` tells which is running."""
        self._lost.append((fault, step))

    def __call__(self, operation: str, sent_bytes: float) -> None:
        self._backend.count_message(sent_bytes)
        for place, (fault, step) in enumerate(self._lost):
            if step() != fault.step:
                continue
            number = self._seen.get(place, 0)
            self._seen[place] = number + 1
            if number == fault.message:
                self._never_send(fault, operation)

    def _never_send(self, fault: FaultConfig, operation: str) -> None:
        """Wait as for an answer, longer than the others wait for the message."""
        seconds = fault.seconds or _timeout() + 5.0
        which = f"{operation} number {fault.message} of step {fault.step}"
        log_dist(f"fault: {which} is lost on rank {self._rank}", ranks=[self._rank])
        time.sleep(seconds)
        raise PeerLostError(
            f"rank {self._rank}: {which} was lost (a fault of backend 'fake'), and nobody answered in {seconds:g} "
            "seconds"
        )


def _timeout() -> float:
    """Seconds that collectives of the default group wait."""
    stated = timeouts.of() if comm.is_initialized() else None
    return (stated or timeouts.default_timeout()).total_seconds()


class Faults:
    """The faults of one engine's config.

    Raises:
        ConfigError: a fault names a parameter, module, element or rank that is not there.
    """

    def __init__(
        self, state: TrainState, hooks: Hooks, faults: list[FaultConfig], messages: Messages
    ) -> None:
        self._reference = weakref.ref(state)  # torch keeps hooks where the garbage collector does not look
        self._rank = state.global_rank
        self._handles: list[Any] = []
        self._done: set[int] = set()
        self._begun = 0
        self._before: list[FaultConfig] = []
        module = state.module
        for number, fault in enumerate(faults):
            if fault.rank >= state.world_size:
                raise self._wrong(
                    number, f"rank {fault.rank} is not there: there are {state.world_size} ranks"
                )
            self._check(number, fault, module)
            if fault.rank != self._rank:
                continue
            if fault.kind == "lost_message":
                messages.lose(fault, self.step)
            elif fault.kind in ("slow_rank", "killed_rank") or fault.target == "parameter":
                self._before.append(fault)
            elif fault.target == "gradient":
                param = dict(names.parameters(module))[str(fault.name)]
                self._handles.append(param.register_hook(self._on_gradient(number, fault)))
            else:
                hook = self._on_output(number, fault)
                self._handles.append(dict(names.modules(module))[str(fault.name)].register_forward_hook(hook))
        if self._before:
            hooks.before_forward.append(self._on_forward)
        hooks.on_destroy.append(self._remove)

    def _remove(self, _: TrainState) -> None:
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _wrong(number: int, why: str) -> ConfigError:
        return ConfigError(f"config key 'xtrain.fake.faults.{number}': {why}")

    def _check(self, number: int, fault: FaultConfig, module: nn.Module) -> None:
        """The same on every rank, so that all of them fail together."""
        if fault.kind not in ("bit_flip", "nan"):
            return
        if fault.target == "activation":
            known = [name for name, _ in names.modules(module) if name]
            if fault.name not in known:
                raise self._wrong(number, unknown_name("module", str(fault.name), known))
            return  # the size of its output is known when it runs
        params = dict(names.parameters(module))
        if fault.name not in params:
            raise self._wrong(number, unknown_name("parameter", str(fault.name), params))
        param = params[fault.name]
        size = full_shape(param).numel()
        if fault.element >= size:
            raise self._wrong(number, f"element {fault.element} is not there: {fault.name!r} has {size}")
        if fault.bit is not None and fault.bit >= param.element_size() * 8:
            raise self._wrong(
                number,
                f"bit {fault.bit} is not there: {fault.name!r} has elements of {param.element_size() * 8}",
            )
        if fault.target == "gradient" and not param.requires_grad:
            raise self._wrong(number, f"parameter {fault.name!r} is frozen and has no gradient")

    # ---------------------------------------------------------------- when

    def step(self) -> int:
        """Number of the step that is running, as the record counts."""
        state = self._reference()
        return 0 if state is None else state.counters.global_steps + 1

    def _due(self, number: int, fault: FaultConfig) -> bool:
        """Whether a fault of a micro-batch is to happen now; it happens once."""
        state = self._reference()
        if state is None or number in self._done or self.step() != fault.step:
            return False
        if state.in_window != fault.micro_batch:
            return False
        self._done.add(number)
        return True

    def _tell(self, fault: FaultConfig, before: float, after: float) -> None:
        log_dist(
            f"fault: {fault.kind} in element {fault.element} of {fault.target} {fault.name!r} at step {fault.step} on "
            f"rank {self._rank}: {before!r} is now {after!r}",
            ranks=[self._rank],
        )

    # ---------------------------------------------------------------- what

    def _on_forward(self, state: TrainState, *_: Any) -> None:
        """Before the first training forward pass of a step."""
        step = self.step()
        if not (state.module.training and torch.is_grad_enabled()) or step == self._begun:
            return
        self._begun = step
        for fault in self._before:
            if fault.kind == "slow_rank":
                if fault.step <= step <= (fault.last_step or fault.step):
                    time.sleep(fault.seconds or 0.0)
            elif fault.step == step and fault.kind == "killed_rank":
                log_dist(f"fault: rank {self._rank} is killed at step {step}", ranks=[self._rank])
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.step == step:
                self._damage_parameter(state, fault)

    def _damage_parameter(self, state: TrainState, fault: FaultConfig) -> None:
        # Not by attribute: in stage 3 that would gather the parameter, on this rank alone.
        param = dict(names.parameters(state.module))[str(fault.name)]
        for group in state.partition.sharded:
            if (mine := _slice_of(group, param)) is not None:
                first, data = mine
                if not first <= fault.element < first + data.numel():
                    raise ConfigError(
                        f"a fault of backend 'fake' hits element {fault.element} of parameter {fault.name!r} on rank "
                        f"{self._rank}, which has elements {first} to {first + data.numel() - 1} of it in stage 3"
                    )
                self._tell(fault, *damage_(data, fault.element - first, fault.bit))
                return
        self._tell(fault, *damage_(param.data, fault.element, fault.bit))

    def _on_gradient(self, number: int, fault: FaultConfig) -> Callable[[torch.Tensor], torch.Tensor | None]:
        def hook(grad: torch.Tensor) -> torch.Tensor | None:
            if not self._due(number, fault):
                return None
            damaged = grad.clone()
            self._tell(fault, *damage_(damaged, fault.element, fault.bit))
            return damaged

        return hook

    def _on_output(self, number: int, fault: FaultConfig) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            tensors = output if isinstance(output, tuple | list) else (output,)
            found = next((t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()), None)
            if found is None or not self._due(number, fault):
                return
            if fault.element >= found.numel() or (fault.bit or 0) >= found.element_size() * 8:
                raise self._wrong(
                    number,
                    f"module {fault.name!r} returns {found.numel()} elements of {found.element_size() * 8} bits",
                )
            # As memory that goes bad: behind autograd's back, and what it has saved changes too.
            self._tell(fault, *damage_(found.data, fault.element, fault.bit))

        return hook


def _slice_of(group: ShardedGroup, param: nn.Parameter) -> tuple[int, torch.Tensor] | None:
    """(number of the first element, this rank's elements) of a divided parameter; None if the group has another's."""
    member = next((index for index, other in enumerate(group.members) if other is param), None)
    if member is None:
        return None
    mine = group.in_shard(member, group.shard)
    return group.own_range(member).start, group.shard[:0] if mine is None else mine
