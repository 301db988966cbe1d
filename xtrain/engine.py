"""The engine: forward, backward, step, with DeepSpeedEngine's methods and counters.

It reads top to bottom like a training loop. State and collectives live in xtrain.zero, files in
xtrain.checkpoint, one-time set-up in xtrain.setup.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from xtrain import comm, direct_backward, emulation, garbage, setup
from xtrain.align.perturb import perturb_if_asked
from xtrain.aligned_random import AlignedRandom
from xtrain.backends import Backend
from xtrain.checkpoint.agreement import Loads
from xtrain.compat import missing
from xtrain.config import BatchSizes, XtrainConfig, solve_batch_sizes
from xtrain.dataloader import make_dataloader
from xtrain.errors import ConfigError, TrainingError
from xtrain.extras import Extras
from xtrain.inquiries import Inquiries
from xtrain.instruments import Instruments
from xtrain.log import log_dist
from xtrain.optim import build_optimizer, check_elementwise, check_fresh
from xtrain.parallel import DataParallelGrid
from xtrain.precision import autocast_region, for_backend, make_loss_scale, make_policy
from xtrain.saving import Saving
from xtrain.schedulers import build_scheduler
from xtrain.settings import Settings
from xtrain.utils import groups as process_groups
from xtrain.watch import LossWatch, check_unused
from xtrain.zero.kinds import optimizer_class
from xtrain.zero.offload import OffloadDeviceEnum, offload_states, reload_states
from xtrain.zero.optimizer import ZeroOptimizer
from xtrain.zero.partition import Partitioner
from xtrain.zero.reducer import GradientReducer


class XtrainEngine(Inquiries, Settings, Extras, Saving, nn.Module):
    """A model with its optimizer, schedule and data-parallel training step.

    Built by `xtrain.initialize`. Methods behave as DeepSpeed documents those of `DeepSpeedEngine`
    (https://www.deepspeed.ai/getting-started/, https://deepspeed.readthedocs.io/en/latest/training.html).

    Attributes:
        module: the user's model; its parameters are views of flat buffers.
        optimizer: a ZeroOptimizer, or None when neither the config nor the call names an optimizer.
        lr_scheduler: stepped once per optimizer step that was not skipped.
        global_steps, micro_steps, global_samples, skipped_steps: counters since the start of training.
    """

    def __init__(
        self,
        module: nn.Module,
        config: XtrainConfig,
        backend: Backend,
        grid: DataParallelGrid,
        optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
        model_parameters: Any = None,
        lr_scheduler: Any = None,
        training_data: Dataset[Any] | None = None,
        collate_fn: Callable[..., Any] | None = None,
        mpu: Any = None,
    ) -> None:
        super().__init__()
        values = config.values
        self.xtrain_config = config
        self.backend = backend
        self.grid = grid
        self.mpu = process_groups.mpu = mpu
        self.client_optimizer, self.client_lr_scheduler = optimizer, lr_scheduler
        self.batch_sizes: BatchSizes = solve_batch_sizes(
            values.train_batch_size,
            values.train_micro_batch_size_per_gpu,
            values.gradient_accumulation_steps,
            grid.replicas,
        )
        self.global_steps = self.micro_steps = self.global_samples = self.skipped_steps = 0
        self._boundary_override: bool | None = None
        self._syncing = True
        self._step_applied = self._stepping = False
        self._backwards = 0  # since the last update
        self.before_update: list[Callable[[], None]] = []
        """Called when the gradients of a step are averaged and not yet applied, on every rank."""

        self.local_rank = comm.get_local_rank()
        self.global_rank = comm.get_rank()
        self.world_size = comm.get_world_size()
        self.device = backend.runtime.device(self.local_rank)
        setup.check_agreement(module, config, grid)
        self.precision = for_backend(make_policy(values, grid.sequence > 1), values, backend)
        self._random = AlignedRandom(values.xtrain.seed, self._place) if values.xtrain.aligned else None
        setup.place_module(module, self.device, self.precision.module, backend, self.precision.buffers)
        perturb_if_asked(module)
        self.module = module
        self.instruments = Instruments(self)

        self.optimizer: ZeroOptimizer | None = None
        self.basic_optimizer = self._basic_optimizer(optimizer, model_parameters)
        # Aligned mode adds micro-batches inside a rank first, for which every rank keeps whole gradients.
        shard = values.zero_optimization.stage >= 2 and not (
            self.precision.aligned and self.batch_sizes.accumulation > 1
        )
        cutter = Partitioner(module, values.zero_optimization, self.precision, backend, grid, shard)
        self.partition = cutter.run(self.basic_optimizer)
        self.loads = Loads(grid)
        if self.basic_optimizer is not None:
            self._make_zero_optimizer(self.basic_optimizer, shard)
        setup.broadcast_states(module, self.partition, grid)
        self.lr_scheduler = self._scheduler(lr_scheduler)
        if values.disable_python_gc:
            garbage.hold(id(self))
            weakref.finalize(self, garbage.release, id(self))
        self.training_dataloader = (
            None if training_data is None else self.deepspeed_io(training_data, collate_fn=collate_fn)
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copy.deepcopy, copy.copy and pickling.

        Raises:
            ConfigError: always; says what to copy instead.
        """
        raise ConfigError(
            "an engine cannot be copied or pickled, because its states are buffers that ranks share: copy its weights, "
            "engine.module_state_dict(), or the model, copy.deepcopy(engine.module) (in ZeRO stage 3 inside "
            "zero.GatheredParameters(engine.module.parameters())); engine.save_checkpoint() saves all states"
        )

    # ---------------------------------------------------------------- set-up

    def _basic_optimizer(self, given: Any, model_parameters: Any) -> torch.optim.Optimizer | None:
        values = self.xtrain_config.values
        if isinstance(given, torch.optim.Optimizer):
            built = given
        elif callable(given):
            built = given(setup.as_param_groups(model_parameters, self.module))
        elif given is not None:
            raise ConfigError(
                f"optimizer must be a torch optimizer or a callable, not {type(given).__name__}"
            )
        elif values.optimizer is None:
            return None
        else:
            groups = setup.as_param_groups(model_parameters, self.module)
            names = {param: name for name, param in self.module.named_parameters()}
            built = build_optimizer(values.optimizer, groups, self.backend.zero.update_chunk, names)
        stage = values.zero_optimization.stage
        check_elementwise(built, stage, values.zero_allow_untested_optimizer)
        if stage or self.precision.module is not None or self.precision.aligned:
            check_fresh(built)  # else it goes on with the model's own parameters
        return built

    def _make_zero_optimizer(self, basic_optimizer: torch.optim.Optimizer, every_backward: bool) -> None:
        values, backend, grid = self.xtrain_config.values, self.backend, self.grid
        zero, gradients = values.zero_optimization, self.partition.gradients
        trained = {param for group in self.partition.trained for param in group.members}
        self._untrained = [p for p in self.module.parameters() if p.requires_grad and p not in trained]
        self._known = trained | set(self._untrained)
        order = {param: index for index, param in enumerate(self.module.parameters())}
        for param in trained - order.keys():
            order[param] = len(order)
        self._reducer = GradientReducer(
            gradients,
            order,
            is_boundary=lambda: self._syncing and self.is_gradient_accumulation_boundary(),
            every_backward=every_backward,
            overlap=backend.zero.overlap_comm if zero.overlap_comm is None else zero.overlap_comm,
            gatherer=self.partition.gatherer,
        )
        self.optimizer = optimizer_class(basic_optimizer, values, self.precision.module)(
            basic_optimizer,
            gradients,
            make_loss_scale(
                values.fp16, values.torch_autocast, backend.precision.initial_scale_power, zero.stage
            ),
            backend,
            grid,
            clip=values.gradient_clipping,
            skip_non_finite=self.precision.skip_non_finite,
            round_norm=self.precision.aligned,
            state_memory=self.partition.state_memory,
            compute_norm=zero.compute_grad_norm,
            apply_non_finite=self.precision.apply_non_finite,
        )
        self._reducer.loss_scaler = self.optimizer.loss_scaler
        self.optimizer.discard = self._discard
        self.optimizer.reducer = self._reducer
        self._reducer.before_reduction = self.loads.check
        self._watch = LossWatch(grid, values.xtrain.max_skipped_steps or None)

    def _discard(self) -> None:
        self._reducer.discard()
        self._watch.clear()
        self.instruments.discard()
        self._backwards = 0

    def _scheduler(self, given: Any) -> Any:
        if callable(given) and not hasattr(given, "step"):
            return given(self.basic_optimizer)
        if given is not None:
            return given
        section = self.xtrain_config.values.scheduler
        if section is None:
            return None
        if self.optimizer is None:
            raise ConfigError("the config has a scheduler but no optimizer: add one, or remove the scheduler")
        return build_scheduler(section, self.optimizer)

    def deepspeed_io(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        route: str = "train",
        pin_memory: bool = True,
        data_sampler: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int | None = None,
    ) -> DataLoader[Any]:
        """A loader of this rank's micro-batches; shuffled for `route="train"`.

        Memory is page-locked where the device is not the host itself.
        """
        return make_dataloader(
            dataset,
            batch_size or self.batch_sizes.micro,
            self.grid,
            shuffle=route == "train",
            drop_last=self.xtrain_config.values.dataloader_drop_last,
            collate_fn=collate_fn,
            workers=num_local_io_workers or 0,
            sampler=data_sampler,
            pin_memory=pin_memory and not self.backend.runtime.host_memory,
        )

    # ---------------------------------------------------------------- the training step

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        aligned = self._random if self._random is not None and self.module.training else nullcontext()
        gatherer = self.partition.gatherer
        running = nullcontext() if gatherer is None or gatherer.hooks is None else gatherer.hooks.forward()
        autocast = autocast_region(self.xtrain_config.values.torch_autocast, self.device.type)
        if self.optimizer is not None:
            self._reducer.come_last()
        with self.instruments.forward(), aligned, running, autocast:
            outputs = self.module(*inputs, **kwargs)
        if self.optimizer is None:
            return outputs
        return direct_backward.divide_gradients(outputs, self.batch_sizes.accumulation)

    def _place(self) -> tuple[int, int]:
        """(step, slot) of the running micro-batch; a slot is data-parallel rank x accumulation steps + index."""
        accumulation = self.batch_sizes.accumulation
        return self.global_steps, self.grid.replica * accumulation + self.micro_steps % accumulation

    def backward(
        self, loss: torch.Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True
    ) -> torch.Tensor:
        """Add the gradients of this micro-batch; at a boundary, start reducing them over the ranks.

        Args:
            loss: scalar, the mean over this rank's micro-batch.
            scale_wrt_gas: divide by the number of accumulation steps.

        Returns:
            The loss as it was differentiated (divided by the accumulation steps).
        """
        if self.optimizer is None:
            raise ConfigError(
                "backward() needs an optimizer: name one in the config or pass it to initialize()"
            )
        if loss.numel() != 1:
            raise ConfigError(
                f"backward() takes a scalar loss, got shape {tuple(loss.shape)}: average it first"
            )
        self._backwards += 1
        divided = loss / self.batch_sizes.accumulation if scale_wrt_gas else loss
        scaled = self._scaled(divided)
        measure = self.instruments
        running = direct_backward.engine_backward(self.loss_scale())
        with measure.backward(loss), self._reducer.backward(), running, measure.differentiation():
            # A script that has switched the check off gets the gradients that autograd computes.
            seed = None if self.precision.apply_non_finite else self._watch.seed(loss, scaled)
            scaled.backward(seed, retain_graph=retain_graph)
        return divided

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        assert self.optimizer is not None
        return loss.float() * self.loss_scale() if self.optimizer.needs_scaler() else loss

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for scripts that call `.backward()` themselves.

        The division by the accumulation steps is done for them, where gradients come to the engine's outputs.

        Raises:
            ConfigError: there is no optimizer, or the loss is no scalar that can be differentiated.
        """
        if self.optimizer is None:
            raise ConfigError("scale() needs an optimizer: name one in the config or pass it to initialize()")
        if not torch.is_tensor(loss) or loss.numel() != 1 or not loss.requires_grad:
            raise ConfigError(
                "scale() takes a loss: a scalar tensor that can be differentiated; other outputs have "
                "tensor.backward(gradient), with a gradient that is multiplied by engine.loss_scale()"
            )
        scaled = self._scaled(loss)
        if self.optimizer.needs_scaler():
            direct_backward.mark_scaled(scaled, self.loss_scale())
        return scaled

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Close a micro-batch; at a boundary, update the weights and the schedule."""
        if not self._syncing:
            raise ConfigError(
                "It is illegal to call Engine.step() inside no_sync context manager: leave the context before it"
            )
        if self.optimizer is None:
            raise ConfigError("step() needs an optimizer: name one in the config or pass it to initialize()")
        if not self._reducer.ran_backward and not self._reducer.adopt():
            raise ConfigError(
                "step() was called, but no gradient has arrived since the last one: call backward(loss)"
            )
        self._step_applied = False
        self._stepping = True
        try:
            with self.instruments.step():
                self._reducer.close_micro_batch()
                boundary = self.is_gradient_accumulation_boundary()
                if boundary:
                    self._update(lr_kwargs or {})
        finally:
            self._stepping = False
        self.instruments.after_micro_batch(boundary)
        self.micro_steps += 1
        if boundary:
            overflow, norm = self.optimizer.overflow, self.optimizer.grad_norm
            falls = self.optimizer.loss_scaler.can_fall
            self._watch.after_step(self.global_steps, overflow, self.precision.skip_non_finite, norm, falls)

    def _update(self, lr_kwargs: dict[str, Any]) -> None:
        assert self.optimizer is not None
        self._reducer.reduce_rest()
        for hook in self.before_update:
            hook()
        unused = self._reducer.finish_window()
        if not self.xtrain_config.values.zero_optimization.ignore_unused_parameters:
            check_unused(unused, self.grid, self.device)
        self.loads.check_parts()
        if self.partition.offloaded:
            raise ConfigError("step() was called while states are offloaded: call reload_states() before it")
        if self.partition.gatherer is not None:
            self.partition.gatherer.make_idle()
        try:
            self.optimizer.step()
        except TrainingError as error:
            raise TrainingError(f"step {self.global_steps + 1}: {error}; {self._watch.describe()}") from None
        self._check_unfrozen()
        for param in self._untrained:
            param.grad = None
        self._step_applied = not self.optimizer.overflow
        if self._step_applied:
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**lr_kwargs)
        else:
            self.skipped_steps += 1
            log_dist(
                f"step {self.global_steps + 1}: gradients are not finite, step skipped; "
                f"loss scale is {self.loss_scale():g}",
                ranks=[0],
            )
        self.global_steps += 1
        self.global_samples += self._samples_of_step()
        self._backwards = 0
        every = self.xtrain_config.values.steps_per_print
        if every and self.global_steps % every == 0:
            rates = f"lr={self.get_lr()}, mom={self.get_mom()}"
            log_dist(f"step={self.global_steps}, skipped={self.skipped_steps}, {rates}", ranks=[0])

    def _check_unfrozen(self) -> None:
        """Say once of a parameter that it has been unfrozen too late to be trained."""
        late = {
            name: param
            for name, param in self.module.named_parameters()
            if param.requires_grad and param not in self._known
        }
        if late:
            self._known.update(late.values())
            self._untrained += late.values()
            log_dist(
                f"{len(late)} parameters are not trained, {next(iter(late))!r} the first of them: they were frozen, or "
                "not there, when initialize() divided the model. Freeze parameters after it, or build a new engine",
                ranks=[0],
                level=logging.WARNING,
            )

    def _samples_of_step(self) -> int:
        """Samples of the step over all ranks; without managed accumulation, backwards are counted."""
        if self.managed_gradient_accumulation():
            return self.batch_sizes.train
        return self.batch_sizes.micro * self.grid.replicas * self._backwards

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up locally and reduce nothing. Not for stage 2 and above."""
        if self.zero_optimization_stage() >= 2:
            raise ConfigError(
                "no_sync context manager is incompatible with ZeRO stage "
                f"{self.zero_optimization_stage()}, where no rank keeps whole gradients: use "
                "gradient_accumulation_steps, or stage 1"
            )
        if not self._syncing:
            raise ConfigError("no_sync context manager reentry is unsupported: leave the outer one out")
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last before an update."""
        if self._boundary_override is not None:
            return self._boundary_override
        if not self.managed_gradient_accumulation():
            return self._stepping
        return (self.micro_steps + 1) % self.batch_sizes.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide by hand where updates happen; None returns to counting."""
        if not self.managed_gradient_accumulation():
            raise ConfigError(
                "set_gradient_accumulation_boundary() was called, but managed_gradient_accumulation is false in the "
                "config: every step() is a boundary"
            )
        self._boundary_override = is_boundary

    def was_step_applied(self) -> bool:
        """Whether the last `step()` changed the weights."""
        return self._step_applied

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        else:
            self.module.zero_grad(set_to_none)

    def train(self, mode: bool = True) -> XtrainEngine:
        """Set the module's training mode."""
        super().train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """Attributes that the engine lacks are the module's, as in DeepSpeed."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is not None and hasattr(module, name):
                return getattr(module, name)
            explained = missing.name_error(f"engine.{name}")
            if explained is not None:
                raise explained from None
            raise

    # ---------------------------------------------------------------- moved elsewhere, and gone

    def offload_states(
        self,
        include: Collection[Any] | None = None,
        device: str = OffloadDeviceEnum.cpu,
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move training states off the device until `reload_states`, as when another model needs the memory.

        Args:
            include: kinds of states (`OffloadStateTypeEnum` or their names); None: all.
            device: "cpu"; or "nvme", which is the disk of `offload_optimizer.nvme_path`.
            pin_memory: page-locked host memory, where the backend has it.
            non_blocking: accepted; the call returns when the states are there.
        """
        if self.optimizer is None:
            raise ConfigError("offload_states() needs an optimizer: without one there are only parameters")
        offload_states(self.partition, self.optimizer, self.backend, include, device, pin_memory)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Undo `offload_states`."""
        if self.optimizer is not None:
            reload_states(self.partition, self.optimizer, self.device)

    def destroy(self) -> None:
        """Detach from the parameters, so that they can be given to another engine.

        In stage 3 they stay divided until then; `zero.GatheredParameters` makes them whole.
        """
        garbage.release(id(self))
        emulation.detach(self)
        self.instruments.close()
        if self.optimizer is not None:
            self._reducer.detach()
        if self.partition.gatherer is not None:
            self.partition.gatherer.detach()
