"""Which ranks do what together, as the script's `mpu` says; without one all ranks are data parallel.

Read once, at initialisation; the engine asks the grid, never the mpu. Grids for scripts that have no mpu are in
mesh.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from xtrain import comm
from xtrain.base.errors import ConfigError, NotImplementedYetError


@dataclass(frozen=True)
class ModelParallel:
    """The ranks that hold different parts of one copy of the model.

    Attributes:
        group: tensor- and pipeline-parallel ranks together; None: this rank alone.
        size, rank: how many there are, and the number of this process among them.
        tensor, pipeline: sizes of the two dimensions; `size` is their product.
        tensor_rank, pipeline_rank: this process's place in them.
    """

    group: dist.ProcessGroup | None = None
    size: int = 1
    rank: int = 0
    tensor: int = 1
    tensor_rank: int = 0
    pipeline: int = 1
    pipeline_rank: int = 0

    @property
    def reports_loss(self) -> bool:
        """Whether this rank's loss counts in the mean: that of the last stage, once for all tensor ranks."""
        return self.tensor_rank == 0 and self.pipeline_rank == self.pipeline - 1


@dataclass(frozen=True)
class DataParallelGrid:
    """The ranks that hold the same parameters: they share states, and add up gradients.

    With sequence parallelism these are data- and sequence-parallel ranks together: parts of one sample, and
    different samples.

    Attributes:
        group: their process group; None for all ranks.
        size: how many there are.
        rank: number of this process among them.
        source: global rank of the first of them, from which parameters are broadcast.
        sequence: ranks that share one sample.
        replica: number of this process's samples among the `replicas`.
        samples_group: with sequence parallelism, the data-parallel group alone, if the script has one.
        sequence_group: the ranks that share one sample; None when each sample is whole.
        model: the ranks that hold the other parts of the model.
    """

    group: dist.ProcessGroup | None
    size: int
    rank: int
    source: int
    sequence: int = 1
    replica: int = -1
    samples_group: dist.ProcessGroup | None = None
    sequence_group: dist.ProcessGroup | None = None
    model: ModelParallel = ModelParallel()

    def __post_init__(self) -> None:
        if self.replica < 0:
            object.__setattr__(self, "replica", self.rank)

    @property
    def replicas(self) -> int:
        """Ranks that see different samples: what batch sizes are divided by."""
        return self.size // self.sequence

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The ranks that see different samples; None when the script has no such group, or for all ranks."""
        return self.group if self.sequence == 1 else self.samples_group


_NAMES = {
    "tensor": ("tensor_model_parallel", "slice_parallel", "model_parallel"),
    "tensor alone": ("tensor_model_parallel", "slice_parallel"),
    "pipeline": ("pipeline_model_parallel", "pipe_parallel"),
    "model": ("model_parallel",),
    "data": ("data_parallel",),
    "sequence": ("sequence_parallel",),
    "sequence-data": ("sequence_data_parallel",),
}
"""Megatron's names for one dimension, newest first, and DeepSpeed's."""


class _Answers:
    """What an mpu says, under whichever of the names it has."""

    def __init__(self, mpu: Any) -> None:
        self._mpu = mpu

    def _method(self, kind: str, what: str) -> Callable[[], Any] | None:
        for name in _NAMES[kind]:
            method = getattr(self._mpu, f"get_{name}_{what}", None)
            if callable(method):
                return method
        return None

    def has(self, kind: str, what: str) -> bool:
        return self._method(kind, what) is not None

    def ask(self, kind: str, what: str, purpose: str) -> Any:
        method = self._method(kind, what)
        if method is None:
            names = " or ".join(f"get_{name}_{what}()" for name in _NAMES[kind])
            raise ConfigError(f"the mpu object has no method {names}: xtrain needs it to find {purpose}")
        return method()

    def size(self, kind: str) -> int:
        """Size of a dimension that an mpu need not have."""
        method = self._method(kind, "world_size")
        return 1 if method is None else int(method())


def _check_size(what: str, group: dist.ProcessGroup | None, size: int) -> None:
    actual = comm.get_world_size(group)
    if actual != size:
        raise ConfigError(f"the mpu object says that {what} has {size} ranks, but its group has {actual}")


def model_from_mpu(given: Any | None) -> ModelParallel:
    """The ranks that hold one copy of the model together, as an mpu says; this one alone when it is None.

    Raises:
        ConfigError: the mpu lacks a method that is needed, or its sizes contradict each other.
    """
    if given is None:
        return ModelParallel()
    mpu = _Answers(given)
    purpose = "the ranks that hold other parts of the model"
    pipeline = mpu.size("pipeline")
    # With pipelines, get_model_parallel_world_size() counts both dimensions in some mpus, and one in others.
    kind = "tensor" if pipeline == 1 else "tensor alone"
    tensor = mpu.size("tensor") if pipeline == 1 else int(mpu.ask(kind, "world_size", purpose))
    size = tensor * pipeline
    if size == 1:
        return ModelParallel()
    whole = mpu.has("model", "group") or pipeline > 1
    group = mpu.ask("model" if whole else "tensor", "group", purpose)
    _check_size("the model-parallel group (tensor x pipeline)", group, size)
    return ModelParallel(
        group=group,
        size=size,
        rank=comm.get_rank(group),
        tensor=tensor,
        tensor_rank=mpu.ask(kind, "rank", purpose) if tensor > 1 else 0,
        pipeline=pipeline,
        pipeline_rank=mpu.ask("pipeline", "rank", purpose) if pipeline > 1 else 0,
    )


def grid_from_mpu(mpu: Any | None) -> DataParallelGrid:
    """The grid that `mpu` describes; all ranks are data parallel when it is None.

    An mpu answers `get_<dimension>_{world_size,rank,group}()` under Megatron's names, old or new, or DeepSpeed's:
    for `data_parallel` always; for `tensor_model_parallel` (`model_parallel`), `pipeline_model_parallel`
    (`pipe_parallel`) and `sequence_parallel` with `sequence_data_parallel` where it has them.

    Raises:
        ConfigError: the mpu lacks a method that is needed, or its sizes contradict each other.
        NotImplementedYetError: it has context-parallel ranks.
    """
    if mpu is None:
        return DataParallelGrid(None, comm.get_world_size(), comm.get_rank(), 0)
    context = getattr(mpu, "get_context_parallel_world_size", None)
    if callable(context) and context() > 1:
        raise NotImplementedYetError(
            "context parallelism (mpu.get_context_parallel_world_size() > 1)",
            "offer those ranks as get_sequence_parallel_group() and get_sequence_data_parallel_group()",
        )
    answers = _Answers(mpu)
    model, sequence = model_from_mpu(mpu), answers.size("sequence")
    purpose = "the data-parallel ranks"
    if sequence > 1:
        shared = "the ranks that hold the same parameters"
        group = answers.ask("sequence-data", "group", shared)
        size = comm.get_world_size(group)
        if answers.has("data", "world_size"):
            replicas, replica = (answers.ask("data", what, purpose) for what in ("world_size", "rank"))
            samples_group = answers.ask("data", "group", purpose)
        else:  # DeepSpeed's own mpu for Ulysses: neighbours share a sample
            replicas, replica, samples_group = size // sequence, comm.get_rank(group) // sequence, None
        sequence_group = answers.ask("sequence", "group", "the ranks that share a sample")
        _check_size("the sequence-parallel group", sequence_group, sequence)
        _check_size("the data- and sequence-parallel group", group, replicas * sequence)
        rank = comm.get_rank(group)
    else:
        group, sequence_group = answers.ask("data", "group", purpose), None
        replicas = size = answers.ask("data", "world_size", purpose)
        replica = rank = answers.ask("data", "rank", purpose)
        samples_group = None
        _check_size("the data-parallel group", group, size)
    # Not all ranks need be in it: two models may train side by side.
    if comm.get_world_size() % (model.size * size):
        raise ConfigError(
            f"the mpu object describes data {size // sequence} x sequence {sequence} x tensor {model.tensor} x "
            f"pipeline {model.pipeline}, which does not divide the {comm.get_world_size()} ranks there are"
        )
    source = dist.get_global_rank(group, 0) if group is not None else 0
    return DataParallelGrid(
        group, size, rank, source, sequence, replica, samples_group, sequence_group, model
    )


_mpu: Any = None
"""That of the engine that was built last."""


def remember(mpu: Any) -> None:
    """Let `current_mpu` be this one; the engine calls it."""
    global _mpu
    _mpu = mpu


def current_mpu() -> Any:
    """The mpu of the engine that was built last; None without one."""
    return _mpu


def counted_once(param: torch.Tensor, model: ModelParallel) -> bool:
    """Whether this rank counts the parameter in the gradient norm, so that a replicated one counts once.

    DeepSpeed's rule: parameters that layers have divided carry a true attribute `model_parallel` (old Megatron) or
    `tensor_model_parallel`; others are whole on each tensor-parallel rank, of which the first counts them. A tied
    parameter that another pipeline stage counts carries `ds_pipe_replicated`.
    """
    if getattr(param, "ds_pipe_replicated", False):
        return False
    divided = getattr(param, "model_parallel", False) or getattr(param, "tensor_model_parallel", False)
    return bool(divided) or model.tensor_rank == 0
