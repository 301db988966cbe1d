"""`xtrain.checkpointing`: activation checkpointing with the names and settings of `deepspeed.checkpointing`.

Recomputation is torch.utils.checkpoint's, which also restores autocast. Added here: random states
by name, inputs kept in pieces or on the host (activations.py), timing, and how all that is configured.
Unlike DeepSpeed, the caller's tensors are never emptied: they may be used after the checkpoint.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.utils.checkpoint

from xtrain.activation_checkpointing.activations import ActivationStore, Arena, ModelParallelGrid
from xtrain.activation_checkpointing.random_states import (
    MODEL_PARALLEL,
    RandomStates,
    RngStatesTracker,
    chosen_backend,
    runtime,
    seed_device,
    tracker,
)
from xtrain.base.errors import ConfigError
from xtrain.base.log import log_dist
from xtrain.config import load_config
from xtrain.config.schema import ActivationCheckpointingConfig
from xtrain.parallel.mpu import Answers

CudaRNGStatesTracker = RngStatesTracker
# Private in DeepSpeed; Megatron-style code and Transformers' copies of it take them.
_CUDA_RNG_STATE_TRACKER = tracker
_MODEL_PARALLEL_RNG_TRACKER_NAME = MODEL_PARALLEL

_SEED_OFFSET = 2718
"""Between the seed of the default state and that of the first model-parallel rank, as in Megatron."""


class _State:
    """What `configure` has set.

    Attributes:
        chosen_by_script: `configure` was called by the script, whose choice `initialize` leaves alone.
        depth: checkpointed functions that are running; the inputs of inner ones are not kept apart.
    """

    def __init__(self) -> None:
        self.settings = ActivationCheckpointingConfig()
        self.mpu: Any = None
        self.configured = False
        self.chosen_by_script = False
        self.arena: Arena | None = None
        self.depth = 0

    def set(self, settings: ActivationCheckpointingConfig) -> None:
        """Take over checked settings."""
        if settings.contiguous_memory_optimization:
            if not settings.partition_activations:
                raise ConfigError(
                    "contiguous activation checkpoints need partition_activations: set it, or leave "
                    "contiguous_memory_optimization out"
                )
            if settings.number_checkpoints is None:
                raise ConfigError(
                    "contiguous activation checkpoints need number_checkpoints, the number of layers: how many "
                    "checkpoint() calls a forward pass has"
                )
        self.settings = settings
        self.arena = (
            Arena(settings.number_checkpoints, chosen_backend().zero.alignment_bytes)
            if settings.contiguous_memory_optimization and settings.number_checkpoints
            else None
        )


_state = _State()


def _ask(mpu: Any, what: str) -> Any:
    return Answers(mpu).ask("tensor", what, "the ranks that compute the same activations")


def _grid() -> ModelParallelGrid:
    mpu = _state.mpu
    if mpu is None or not _state.settings.partition_activations:
        return ModelParallelGrid()
    return ModelParallelGrid(_ask(mpu, "group"), _ask(mpu, "world_size"), _ask(mpu, "rank"))


def configure(
    mpu_: Any,
    deepspeed_config: str | Path | Mapping[str, Any] | None = None,
    partition_activations: bool | None = None,
    contiguous_checkpointing: bool | None = None,
    num_checkpoints: int | None = None,
    checkpoint_in_cpu: bool | None = None,
    synchronize: bool | None = None,
    profile: bool | None = None,
) -> None:
    """Set how activations are kept; arguments win over the config's `activation_checkpointing`.

    Args:
        mpu_: answers get_{tensor_,}model_parallel_{rank,world_size,group}; None keeps the one set before.
        deepspeed_config: a DeepSpeed config, as `initialize` takes it.
        partition_activations: split inputs over the model-parallel ranks.
        contiguous_checkpointing: copy the pieces into preallocated blocks; needs the two around it.
        num_checkpoints: `checkpoint()` calls in one forward pass.
        checkpoint_in_cpu: move inputs to host memory until backward.
        synchronize: wait for the device before and after each checkpointed function.
        profile: log the time of each forward pass and recomputation on rank 0.

    Raises:
        ConfigError: a wrong config, or settings that need each other.
    """
    if mpu_ is not None:
        _state.mpu = mpu_
    section = ActivationCheckpointingConfig()
    if deepspeed_config is not None:
        section = load_config(deepspeed_config).values.activation_checkpointing
    given = {
        "partition_activations": partition_activations,
        "contiguous_memory_optimization": contiguous_checkpointing,
        "number_checkpoints": num_checkpoints,
        "cpu_checkpointing": checkpoint_in_cpu,
        "synchronize_checkpoint_boundary": synchronize,
        "profile": profile,
    }
    _state.set(section.model_copy(update={key: value for key, value in given.items() if value is not None}))
    _state.configured = _state.chosen_by_script = True
    log_dist(f"activation checkpointing: {_state.settings}", ranks=[0])


def configure_from_engine(section: ActivationCheckpointingConfig, mpu: Any) -> None:
    """What `initialize` does with the config's section, unless the script has called `configure`."""
    if _state.chosen_by_script:
        return
    if mpu is not None:
        _state.mpu = mpu
    _state.set(section)
    _state.configured = True


def is_configured() -> bool:
    """Whether `configure` was called, by the script or by `initialize` for the config's section."""
    return _state.configured


def partition_activations_in_checkpoint(partition_activation: bool) -> None:
    """Switch the splitting of inputs over the model-parallel ranks on or off."""
    _state.set(_state.settings.model_copy(update={"partition_activations": partition_activation}))


def set_num_layers(nlayers: int) -> None:
    """Say how many checkpoints a forward pass has."""
    _state.set(_state.settings.model_copy(update={"number_checkpoints": nlayers}))


def reset() -> None:
    """Give up contiguous blocks, after forward passes that no backward follows (evaluation)."""
    if _state.arena is not None:
        _state.arena.forget()


# -------------------------------------------------------------------- checkpointed functions


@contextmanager
def _watched(what: str) -> Iterator[None]:
    settings = _state.settings
    waits = settings.synchronize_checkpoint_boundary or settings.profile
    if waits:
        runtime().synchronize()
    start = time.perf_counter()
    _state.depth += 1
    try:
        yield
    finally:  # torch ends a recomputation that has reached its last needed tensor with an exception
        _state.depth -= 1
        if waits:
            runtime().synchronize()
        if settings.profile:
            milliseconds = (time.perf_counter() - start) * 1e3
            log_dist(f"activation checkpoint: {what} took {milliseconds:.2f} ms", ranks=[0])


class _Recomputable:
    """A function whose second and later calls draw the random numbers of the first."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._states: RandomStates | None = None

    def __call__(self, *args: Any) -> Any:
        if self._states is None:
            self._states = RandomStates()
            with _watched("forward"):
                return self._result(args)
        with self._states.again(), _watched("recomputation"):
            return self._result(args)

    def _result(self, args: tuple[Any, ...]) -> Any:
        result = self._function(*args)
        return tuple(result) if isinstance(result, list) else result


def _run(function: Callable[..., Any], args: tuple[Any, ...], reentrant: bool) -> Any:
    keeping: AbstractContextManager[None] = nullcontext()
    settings = _state.settings
    if _state.depth == 0 and (settings.partition_activations or settings.cpu_checkpointing):
        keeping = ActivationStore(_grid(), settings.cpu_checkpointing, _state.arena).keeping(args)
    with keeping:
        result = torch.utils.checkpoint.checkpoint(
            _Recomputable(function), *args, use_reentrant=reentrant, preserve_rng_state=False
        )
    if reentrant and not (torch.is_tensor(result) or isinstance(result, tuple)):
        raise ConfigError(
            f"a function under checkpoint() returned {type(result).__name__}: return a tensor or a tuple, or use "
            "non_reentrant_checkpoint(), which takes anything"
        )
    return result[0] if isinstance(result, tuple) and len(result) == 1 else result


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, whose intermediate results are recomputed in backward (re-entrant).

    Tensors in `kwargs` get gradients like positional ones. At least one tensor among the arguments must
    require a gradient, and backward must be `.backward()`, not `torch.autograd.grad`.

    Returns:
        What the function returns; a tuple for a list, and the item of a tuple of one.

    Raises:
        ConfigError: the function returns neither a tensor nor a tuple or list.
    """
    if not kwargs:
        return _run(function, args, reentrant=True)
    names, count = tuple(kwargs), len(args)

    def positional(*everything: Any) -> Any:
        return function(*everything[:count], **dict(zip(names, everything[count:], strict=True)))

    return _run(positional, (*args, *kwargs.values()), reentrant=True)


def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    """As `checkpoint`, without its conditions: no argument need require a gradient."""
    return _run(function, args, reentrant=False)


class CheckpointFunction:
    """DeepSpeed's entry below `checkpoint`, for scripts that call it: `apply(function, all_outputs, *args)`."""

    @staticmethod
    def apply(function: Callable[..., Any], all_outputs: list[Any], *args: Any) -> Any:
        """Run `checkpoint` and append what it returns to `all_outputs`, too."""
        result = _run(function, args, reentrant=True)
        all_outputs += result if isinstance(result, tuple) else [result]
        return result


# -------------------------------------------------------------------- random states


_CUDA_RNG_STATE_TRACKER = tracker
_MODEL_PARALLEL_RNG_TRACKER_NAME = MODEL_PARALLEL
"""DeepSpeed's private names, which forks of Megatron read."""


def _set_cuda_rng_state(new_state: torch.Tensor, device: int = -1) -> None:
    """Set the state of the device's generator, under the private name that copies of Megatron's code take."""
    runtime().set_rng_state(new_state)


def detach_variable(inputs: Any, device: Any = None) -> tuple[Any, ...]:
    """The inputs cut off from their graph, each with the `requires_grad` that it had; moved to `device` if given.

    Raises:
        ConfigError: they are no tuple.
    """
    if not isinstance(inputs, tuple):
        raise ConfigError(f"detach_variable() takes a tuple of tensors, got {type(inputs).__name__}")

    def detached(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return (value if device is None else value.to(device)).detach().requires_grad_(value.requires_grad)

    return tuple(map(detached, inputs))


def get_cuda_rng_tracker() -> RngStatesTracker:
    """The tracker of named random states, whatever the device is."""
    return tracker


def _model_parallel_seed(seed: int) -> int:
    return seed + _SEED_OFFSET + (_ask(_state.mpu, "rank") if _state.mpu is not None else 0)


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the device's default state with `seed`, alike on all ranks, and begin a state that differs
    between model-parallel ranks (`get_cuda_rng_tracker().fork()` draws from it)."""
    tracker.reset()
    seed_device(seed)
    tracker.add(MODEL_PARALLEL, _model_parallel_seed(seed))


def model_parallel_reconfigure_tp_seed(seed: int) -> None:
    """Seed the model-parallel state anew."""
    with tracker.fork():
        seed_device(_model_parallel_seed(seed))


# -------------------------------------------------------------------- DeepSpeed's names of the settings


def _setting(key: str) -> Any:
    def write(_: ModuleType, value: Any) -> None:
        _state.set(_state.settings.model_copy(update={key: value}))

    return property(lambda _: getattr(_state.settings, key), write)


def _field(name: str) -> Any:
    return property(lambda _: getattr(_state, name), lambda _, value: setattr(_state, name, value))


class _Checkpointing(ModuleType):
    """This module: scripts read, and set, what `configure` has set as if it were globals, as it is in DeepSpeed."""

    PARTITION_ACTIVATIONS = _setting("partition_activations")
    CONTIGUOUS_CHECKPOINTING = _setting("contiguous_memory_optimization")
    CPU_CHECKPOINT = _setting("cpu_checkpointing")
    SYNCHRONIZE = _setting("synchronize_checkpoint_boundary")
    PROFILE_TIME = _setting("profile")
    num_layers = _setting("number_checkpoints")
    mpu = _field("mpu")
    deepspeed_checkpointing_enabled = _field("configured")


sys.modules[__name__].__class__ = _Checkpointing
