"""Named states of the device's random numbers (Megatron's tracker), and all states at one moment.

For scripts whose ranks must draw alike in some layers and apart in others, and for activation
checkpointing, which draws again what it drew before. Aligned mode has randomness of its own
(aligned_random.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from xtrain import comm
from xtrain.backends import Backend, registry
from xtrain.backends.backend import RuntimeFacet
from xtrain.base.errors import ConfigError

MODEL_PARALLEL = "model-parallel-rng"
"""Name of the state that differs between model-parallel ranks."""

_backend: Backend | None = None


def use_backend(backend: Backend) -> None:
    """Let the states be those of `backend`'s device; `initialize` calls it."""
    global _backend
    _backend = backend


def chosen_backend() -> Backend:
    """The backend of the last `initialize`, or the one that is detected."""
    return _backend or registry.detect()


def runtime() -> RuntimeFacet:
    """The facet that knows the device's generator."""
    return chosen_backend().runtime


def seed_device(seed: int) -> None:
    """Seed the device's default generator, and no other."""
    facet = runtime()
    generator = torch.Generator(device=facet.device(comm.get_local_rank()))
    facet.set_rng_state(generator.manual_seed(seed).get_state())


class RngStatesTracker:
    """States of the device's generator by name.

    Example::

        tracker.add("dropout", seed=7)
        with tracker.fork("dropout"):
            x = dropout(x)   # draws from "dropout"; the default state stays where it was
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all states."""
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """State of each name: uint8 tensors on the host."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Continue from what `get_states` returned."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Begin a state.

        Raises:
            ConfigError: the name or the seed is taken.
        """
        if seed in self.seeds_:
            raise ConfigError(f"random seed {seed} is tracked already: choose another for {name!r}")
        if name in self.states_:
            raise ConfigError(f"a random state called {name!r} is tracked already: reset() the tracker first")
        facet = runtime()
        before = facet.get_rng_state()
        seed_device(seed)
        self.seeds_.add(seed)
        self.states_[name] = facet.get_rng_state()
        facet.set_rng_state(before)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Inside, the device draws from the state called `name`, which moves on.

        Raises:
            ConfigError: there is no such state.
        """
        if name not in self.states_:
            raise ConfigError(
                f"no random state is called {name!r}: call model_parallel_cuda_manual_seed(seed), or add() it"
            )
        facet = runtime()
        before = facet.get_rng_state()
        facet.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = facet.get_rng_state()
            facet.set_rng_state(before)


tracker = RngStatesTracker()
"""The tracker of this process."""


class RandomStates:
    """The generators of host and device and the tracker's states, at the moment of construction."""

    def __init__(self) -> None:
        facet = runtime()
        self._host = torch.get_rng_state()
        self._device = None if facet.host_memory else facet.get_rng_state()
        self._named = tracker.get_states()

    def restore(self) -> None:
        """Put everything back."""
        torch.set_rng_state(self._host)
        if self._device is not None:
            runtime().set_rng_state(self._device)
        tracker.set_states(self._named)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, what is drawn is what was drawn after construction; afterwards nothing has moved."""
        here = RandomStates()
        self.restore()
        try:
            yield
        finally:
            here.restore()
