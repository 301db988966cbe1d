"""What is done once to a model before the engine can train it: checked, placed, divided, and given an optimizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from xtrain import comm
from xtrain.backends import Backend
from xtrain.backends.alignment import is_aligned
from xtrain.base.errors import ConfigError
from xtrain.config import XtrainConfig, solve_batch_sizes
from xtrain.optim import build_optimizer, check_elementwise, check_for_offload, check_fresh
from xtrain.parallel import DataParallelGrid
from xtrain.precision import PrecisionPolicy, for_backend, make_loss_scale, make_policy
from xtrain.precision.autocast import mark_communication
from xtrain.reproducible.perturbation import perturb_if_asked, perturb_masters
from xtrain.zero import names
from xtrain.zero.buffers import broadcast_buffers, broadcast_dense, set_buffer
from xtrain.zero.home import full_shape, home_of
from xtrain.zero.optimizer import ZeroOptimizer
from xtrain.zero.owners import register
from xtrain.zero.partition import Partition, Partitioner
from xtrain.zero.reducer import GradientReducer
from xtrain.zero.shards import ShardedGroup
from xtrain.zero.train_state import TrainState

OptimizerClass = Callable[[torch.optim.Optimizer, XtrainConfig, PrecisionPolicy], type[ZeroOptimizer]]
"""Which class of ZeroOptimizer wraps an optimizer."""


ALIGNED_IS_NOT_COMPILED = (
    "{what} fuses operations, which rounds differently on each chip: leave it out in aligned mode"
)


class Builder:
    """Places a model, divides its states, and makes what reduces and applies its gradients.

    Args:
        module: on any device, in any dtype.
        optimizer: the script's, as `initialize` takes it.
        model_parameters: as `initialize` takes them.
        wrapper: says which class wraps the optimizer.
    """

    def __init__(
        self,
        module: nn.Module,
        config: XtrainConfig,
        backend: Backend,
        grid: DataParallelGrid,
        optimizer: Any,
        model_parameters: Any,
        wrapper: OptimizerClass,
    ) -> None:
        values = config.values
        self.module, self.config, self.backend, self.grid = module, config, backend, grid
        self._wrapper = wrapper
        self.batch_sizes = solve_batch_sizes(
            values.train_batch_size,
            values.train_micro_batch_size_per_gpu,
            values.gradient_accumulation_steps,
            grid.replicas,
        )
        self.device = backend.runtime.device(comm.get_local_rank())
        check_agreement(module, config, grid)
        if values.xtrain.aligned and names.is_compiled(module):
            raise ConfigError(ALIGNED_IS_NOT_COMPILED.format(what="torch.compile() of the model"))
        self.precision = for_backend(make_policy(values, grid.sequence > 1), values, backend)
        place_module(module, self.device, self.precision.module, backend, self.precision.buffers)
        mark_communication(module, values.torch_autocast, self.precision.aligned)
        perturb_if_asked(module, grid.replica)
        self._basic = self._basic_optimizer(optimizer, model_parameters)
        # Aligned mode adds micro-batches inside a rank first, for which every rank keeps whole gradients.
        adds_first = self.precision.aligned and self.batch_sizes.accumulation > 1
        self._shard_gradients = values.zero_optimization.stage >= 2 and not adds_first

    def run(
        self, before_reduction: Callable[[], None], on_discard: Callable[[], None]
    ) -> tuple[TrainState, GradientReducer | None]:
        """Take the parameters over; the reducer is None where nothing is trained. Collective.

        Args:
            before_reduction: called before the first thing that other ranks get to see.
            on_discard: called when the gradients of a window are given up.
        """
        zero, optimizer, reducer = self.config.values.zero_optimization, None, None
        partition = Partitioner(
            self.module, zero, self.precision, self.backend, self.grid, self._shard_gradients
        ).run(self._basic)
        if self._basic is not None:
            optimizer, reducer = self._trained(self._basic, partition, before_reduction, on_discard)
        broadcast_states(self.module, partition, self.grid)
        perturb_masters(self.module)
        state = TrainState(
            self.module,
            self.config,
            self.backend,
            self.device,
            self.grid,
            self.batch_sizes,
            partition,
            optimizer,
        )
        return state, reducer

    def _basic_optimizer(self, given: Any, model_parameters: Any) -> torch.optim.Optimizer | None:
        values = self.config.values
        if isinstance(given, torch.optim.Optimizer):
            built = given
        elif callable(given):
            built = given(as_param_groups(model_parameters, self.module))
        elif given is not None:
            raise ConfigError(
                f"optimizer must be a torch optimizer or a callable, not {type(given).__name__}"
            )
        elif values.optimizer is None:
            return None
        else:
            groups = as_param_groups(model_parameters, self.module)
            named = {param: name for name, param in names.parameters(self.module)}
            built = build_optimizer(values.optimizer, groups, self.backend.zero.update_chunk, named)
        offload = values.zero_optimization.offload_optimizer
        insists = (
            values.zero_force_ds_cpu_optimizer and "zero_force_ds_cpu_optimizer" in values.model_fields_set
        )
        if given is not None and insists and offload is not None and offload.device != "none":
            check_for_offload(built)
        stage = values.zero_optimization.stage
        check_elementwise(built, stage, values.zero_allow_untested_optimizer)
        if stage or self.precision.module is not None or self.precision.aligned:
            check_fresh(built)  # else it goes on with the model's own parameters
        return built

    def _trained(
        self,
        basic: torch.optim.Optimizer,
        partition: Partition,
        before_reduction: Callable[[], None],
        on_discard: Callable[[], None],
    ) -> tuple[ZeroOptimizer, GradientReducer]:
        values, backend, precision = self.config.values, self.backend, self.precision
        zero = values.zero_optimization
        scale = make_loss_scale(
            values.fp16, values.torch_autocast, backend.precision.initial_scale_power, zero.stage
        )
        order = {param: index for index, param in enumerate(self.module.parameters())}
        for group in partition.trained:
            for param in group.members:
                order.setdefault(param, len(order))
        reducer = GradientReducer(
            partition.gradients,
            order,
            every_backward=self._shard_gradients,
            overlap=backend.zero.overlap_comm if zero.overlap_comm is None else zero.overlap_comm,
            loss_scaler=scale,
            before_reduction=before_reduction,
            on_discard=on_discard,
            gatherer=partition.gatherer,
        )
        optimizer = self._wrapper(basic, self.config, precision)(
            basic,
            partition.gradients,
            reducer,
            scale,
            backend,
            self.grid,
            clip=values.gradient_clipping,
            skip_non_finite=precision.skip_non_finite,
            round_norm=precision.aligned,
            state_memory=partition.state_memory,
            compute_norm=zero.compute_grad_norm,
            apply_non_finite=precision.apply_non_finite,
        )
        register(optimizer)
        return optimizer, reducer


def as_param_groups(parameters: Iterable[Any] | None, module: nn.Module) -> list[dict[str, Any]]:
    """`model_parameters` of initialize() as optimizer groups; frozen parameters are left out."""
    items = list(module.parameters() if parameters is None else parameters)
    if not items:
        raise ConfigError("model_parameters is empty: pass the model's parameters, or None for all of them")
    groups = items if isinstance(items[0], dict) else [{"params": items}]
    groups = [
        {**group, "params": [group["params"]] if torch.is_tensor(group["params"]) else list(group["params"])}
        for group in groups
    ]
    for group in groups:
        for param in group["params"]:
            if not torch.is_tensor(param):
                raise ConfigError(
                    f"model_parameters must hold tensors or groups of them, not {type(param).__name__}: "
                    "pass model.parameters()"
                )
    trainable = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    if not any(group["params"] for group in trainable):
        raise ConfigError("no parameter requires a gradient: there is nothing to train")
    return trainable


def place_module(
    module: nn.Module,
    device: torch.device,
    dtype: torch.dtype | None,
    backend: Backend,
    buffer_dtype: torch.dtype | None = None,
) -> None:
    """Move the module to the device; cast floating parameters to `dtype` and buffers to `buffer_dtype`.

    None leaves them: buffers such as running statistics and rotary frequencies keep their precision unless the
    config says otherwise, as in DeepSpeed.

    Tensors that begin anywhere in a larger block (views of a mapped checkpoint file) get memory of their own: what
    stays there would give other bits than what a stage copies or gathers.

    Raises:
        ConfigError: a parameter has a dtype that the backend does not compute in.
    """
    module.to(device=device)
    cast_module(module, dtype, buffer_dtype)
    _align(module)
    for name, param in names.parameters(module):
        real = param.is_floating_point() or param.is_complex()
        if real and param.dtype not in backend.precision.native_dtypes:
            native = ", ".join(sorted(str(d).removeprefix("torch.") for d in backend.precision.native_dtypes))
            raise ConfigError(
                f"parameter {name!r} is {str(param.dtype).removeprefix('torch.')}, which backend {backend.name!r} "
                f"does not train in: cast the model to one of {native}"
            )


def cast_module(module: nn.Module, dtype: torch.dtype | None, buffer_dtype: torch.dtype | None) -> None:
    """Cast floating-point parameters, whole or divided, and buffers; None leaves them as they are."""
    for param in module.parameters():
        if dtype is not None and param.is_floating_point() and param.dtype != dtype:
            if (home := home_of(param)) is not None and not param.numel():
                home.cast(dtype)
            else:
                param.data = param.data.to(dtype)
    for buffer in list(module.buffers()):
        if buffer_dtype is not None and buffer.is_floating_point() and buffer.dtype != buffer_dtype:
            set_buffer(module, buffer, buffer.detach().to(buffer_dtype))


def _align(module: nn.Module) -> None:
    """Move parameters and buffers that begin at an odd place to memory of their own, but for those that share it."""
    placed = [
        (tensor.data_ptr(), tensor)
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.layout == torch.strided
        and tensor.numel()
        and not tensor.is_meta
        # Made of other tensors (quantized weights): it has no memory itself.
        and not is_traceable_wrapper_subclass(tensor)
    ]
    placed.sort(key=lambda item: item[0])
    starts = [start for start, _ in placed] + [2**63]
    reached = 0  # where those before end
    for number, (start, tensor) in enumerate(placed):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        end = start + (last + 1) * tensor.element_size()
        if not is_aligned(tensor) and reached <= start and end <= starts[number + 1]:
            tensor.data = tensor.data.clone()
        reached = max(reached, end)


def _describe_parameters(module: nn.Module) -> list[str]:
    return [
        f"{name} {tuple(full_shape(param))} {str(param.dtype).removeprefix('torch.')}"
        f"{'' if param.requires_grad else ' frozen'}"
        for name, param in names.parameters(module)
    ]


def check_agreement(module: nn.Module, config: XtrainConfig, grid: DataParallelGrid) -> None:
    """Fail on every rank, naming the first difference, when ranks disagree on parameters or config.

    Only ranks that hold the same parameters are compared; those that hold other parts of the model fail with them.
    """
    problem = _disagreement(module, config, grid)
    if grid.model.size > 1:
        problems: list[str | None] = [None] * grid.model.size
        comm.all_gather_object(problems, problem, group=grid.model.group)
        problem = problem or next((other for other in problems if other), None)
    if problem is not None:
        raise ConfigError(problem)


def _disagreement(module: nn.Module, config: XtrainConfig, grid: DataParallelGrid) -> str | None:
    """The first difference between ranks that hold the same parameters; equal on all of them.

    Without this check a disagreement shows as a hang or as a wrong curve. Fingerprints are exchanged
    first; the full descriptions only when they differ.
    """
    description = {
        "parameters": _describe_parameters(module),
        "config": json.dumps(config.public(), sort_keys=True, default=repr),
    }
    text = json.dumps(description, sort_keys=True)
    fingerprints = [""] * grid.size
    comm.all_gather_object(fingerprints, hashlib.sha256(text.encode()).hexdigest(), group=grid.group)
    if len(set(fingerprints)) == 1:
        return None
    everyone: list[dict[str, Any]] = [{}] * grid.size
    comm.all_gather_object(everyone, description, group=grid.group)
    other = next(rank for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0])
    if everyone[0]["config"] != everyone[other]["config"]:
        configs = f"{everyone[0]['config']} and {everyone[other]['config']}"
        return f"ranks 0 and {other} were given different configs: {configs}"
    ours, theirs = everyone[0]["parameters"], everyone[other]["parameters"]
    for mine, its in zip(ours, theirs, strict=False):
        if mine != its:
            return f"ranks 0 and {other} disagree on a parameter: {mine!r} and {its!r}"
    return f"rank 0 has {len(ours)} parameters and rank {other} has {len(theirs)}"


@torch.no_grad()
def broadcast_states(module: nn.Module, partition: Partition, grid: DataParallelGrid) -> None:
    """Give every rank the parameters and buffers of the first data-parallel rank.

    Divided parameters are not concerned: they are cut from the first rank's values.
    """
    whole = [group for group in partition.trained if not isinstance(group, ShardedGroup)]
    if grid.size > 1:
        known = {param for group in (*partition.trained, *partition.frozen) for param in group.members}
        loose = [param.data for param in module.parameters() if param not in known]
        for tensor in [*(group.params for group in whole), *loose]:
            broadcast_dense(tensor, grid)
        broadcast_buffers(module, grid)
    for group in whole:
        group.refresh_masters()
