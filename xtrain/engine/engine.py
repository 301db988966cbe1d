"""The engine: forward, backward, step.

It reads top to bottom like a training loop. States and collectives live in xtrain.zero, one-time set-up in build.py,
and whatever watches training registers at the hooks of hooks.py. What scripts see is the class in
xtrain.runtime.engine, which adds DeepSpeed's other methods to this one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from xtrain import comm
from xtrain.backends import Backend
from xtrain.base.errors import ConfigError, TrainingError
from xtrain.base.log import log_dist
from xtrain.checkpoint.loads import Loads
from xtrain.config import XtrainConfig
from xtrain.engine import gc
from xtrain.engine.build import Builder
from xtrain.engine.hooks import Hooks
from xtrain.engine.loss_guard import LossGuard, check_unused
from xtrain.engine.untrained import Untrained
from xtrain.optim.schedules import build_scheduler
from xtrain.parallel import DataParallelGrid
from xtrain.parallel import mpu as mpus
from xtrain.precision import PrecisionPolicy, autocast_region, direct_backward
from xtrain.reproducible.aligned_random import AlignedRandom
from xtrain.zero.optimizer import ZeroOptimizer
from xtrain.zero.reducer import GradientReducer


class Engine(nn.Module):
    """A model with its optimizer, schedule and data-parallel training step.

    Attributes:
        module: the user's model.
        train_state: all that training has made; `train_hooks` get it.
        train_hooks: who is called when.
        checkpoint_folder: that was last saved to, or trained on from; None before.
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
        mpu: Any = None,
    ) -> None:
        super().__init__()
        values = config.values
        self.xtrain_config, self.backend, self.grid, self.mpu = config, backend, grid, mpu
        mpus.remember(mpu)
        self.client_optimizer, self.client_lr_scheduler = optimizer, lr_scheduler
        self.local_rank, self.global_rank = comm.get_local_rank(), comm.get_rank()
        self.world_size = comm.get_world_size()
        builder = Builder(module, config, backend, grid, optimizer, model_parameters, self._optimizer_class)
        self.precision = builder.precision
        self.module = module
        self.train_hooks = Hooks()
        self.loads = Loads(grid)
        self._loss_guard = LossGuard(grid, values.xtrain.max_skipped_steps or None)
        self.train_state, self._reducer = builder.run(self.loads.check, self._discarded)
        self._untrained = Untrained(module, self.train_state.partition)
        self.train_state.lr_scheduler = self._scheduler(lr_scheduler)
        self._random = (
            AlignedRandom(values.xtrain.seed, self.train_state.place) if values.xtrain.aligned else None
        )
        self._boundary_override: bool | None = None
        self._syncing = True
        self._step_applied = self._stepping = False
        self.checkpoint_folder: str | None = None
        self._backwards = 0  # since the last update
        self._tell_boundary()
        if values.disable_python_gc:
            gc.hold(id(self))
            weakref.finalize(self, gc.release, id(self))

    @staticmethod
    def _optimizer_class(
        optimizer: torch.optim.Optimizer, config: XtrainConfig, precision: PrecisionPolicy
    ) -> type[ZeroOptimizer]:
        """The class that wraps the optimizer."""
        return ZeroOptimizer

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

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.train_state.device

    @property
    def optimizer(self) -> ZeroOptimizer | None:
        """What updates the model; None when neither the config nor the call names an optimizer."""
        return self.train_state.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: ZeroOptimizer | None) -> None:
        self.train_state.optimizer = optimizer

    @property
    def lr_scheduler(self) -> Any:
        """Stepped once per optimizer step that was not skipped."""
        return self.train_state.lr_scheduler

    @lr_scheduler.setter
    def lr_scheduler(self, scheduler: Any) -> None:
        self.train_state.lr_scheduler = scheduler

    def _scheduler(self, given: Any) -> Any:
        if callable(given) and not hasattr(given, "step"):
            optimizer = self.train_state.optimizer
            return given(None if optimizer is None else optimizer.optimizer)
        if given is not None:
            return given
        section = self.xtrain_config.values.scheduler
        if section is None:
            return None
        if self.train_state.optimizer is None:
            raise ConfigError("the config has a scheduler but no optimizer: add one, or remove the scheduler")
        return build_scheduler(section, self.train_state.optimizer)

    def _discarded(self) -> None:
        """The gradients of the running window were given up."""
        self._loss_guard.clear()
        self._backwards = 0
        for hook in self.train_hooks.on_discard:
            hook(self.train_state)

    # ---------------------------------------------------------------- the training step

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        state, hooks = self.train_state, self.train_hooks
        gatherer = state.partition.gatherer
        aligned = self._random if self._random is not None and self.module.training else nullcontext()
        running = nullcontext() if gatherer is None or gatherer.hooks is None else gatherer.hooks.forward()
        autocast = autocast_region(state.values.torch_autocast, self.device.type)
        if self._reducer is not None:
            self._reducer.come_last()
            self._tell_boundary()
        for before in hooks.before_forward:
            inputs, kwargs = before(state, inputs, kwargs) or (inputs, kwargs)
        with hooks.phase(state), aligned, running, autocast:
            outputs = self.module(*inputs, **kwargs)
        for after in hooks.after_forward:
            after(state, outputs)
        if self._reducer is None:
            return outputs
        return direct_backward.divide_gradients(outputs, state.batch_sizes.accumulation)

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
        optimizer, reducer = self._trained("backward()")
        if loss.numel() != 1:
            raise ConfigError(
                f"backward() takes a scalar loss, got shape {tuple(loss.shape)}: average it first"
            )
        state, hooks = self.train_state, self.train_hooks
        self._backwards += 1
        divided = loss / state.batch_sizes.accumulation if scale_wrt_gas else loss
        scaled = self._scaled(divided, optimizer)
        self._tell_boundary()
        for before in hooks.before_backward:
            before(state, loss)
        running = direct_backward.engine_backward(optimizer.loss_scale)
        with hooks.phase(state), reducer.backward(), running:
            # A script that has switched the check off gets the gradients that autograd computes.
            seed = None if self.precision.apply_non_finite else self._loss_guard.seed(loss, scaled)
            scaled.backward(seed, retain_graph=retain_graph)
            for differentiated in hooks.after_differentiation:
                differentiated(state)
        for after in hooks.after_backward:
            after(state)
        return divided

    def _trained(self, call: str) -> tuple[ZeroOptimizer, GradientReducer]:
        """What trains the model.

        Raises:
            ConfigError: nothing does, and the call needs it.
        """
        optimizer = self.train_state.optimizer
        if optimizer is None or self._reducer is None:
            raise ConfigError(f"{call} needs an optimizer: name one in the config or pass it to initialize()")
        return optimizer, self._reducer

    @staticmethod
    def _scaled(loss: torch.Tensor, optimizer: ZeroOptimizer) -> torch.Tensor:
        return loss.float() * optimizer.loss_scale if optimizer.needs_scaler() else loss

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for scripts that call `.backward()` themselves.

        The division by the accumulation steps is done for them, where gradients come to the engine's outputs.

        Raises:
            ConfigError: there is no optimizer, or the loss is no scalar that can be differentiated.
        """
        optimizer, _ = self._trained("scale()")
        if not torch.is_tensor(loss) or loss.numel() != 1 or not loss.requires_grad:
            raise ConfigError(
                "scale() takes a loss: a scalar tensor that can be differentiated; other outputs have "
                "tensor.backward(gradient), with a gradient that is multiplied by engine.loss_scale()"
            )
        scaled = self._scaled(loss, optimizer)
        if optimizer.needs_scaler():
            direct_backward.mark_scaled(scaled, optimizer.loss_scale)
        return scaled

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Close a micro-batch; at a boundary, update the weights and the schedule."""
        state, hooks = self.train_state, self.train_hooks
        if not self._syncing:
            raise ConfigError(
                "It is illegal to call Engine.step() inside no_sync context manager: leave the context before it"
            )
        optimizer, reducer = self._trained("step()")
        if not reducer.ran_backward and not reducer.adopt():
            raise ConfigError(
                "step() was called, but no gradient has arrived since the last one: call backward(loss)"
            )
        self._step_applied = False
        self._stepping = True
        try:
            boundary = self._tell_boundary()
            for before in hooks.before_step:
                before(state, boundary)
            with hooks.phase(state):
                reducer.close_micro_batch()
                if boundary:
                    self._update(reducer, optimizer, lr_kwargs or {})
        finally:
            self._stepping = False
        for after in hooks.after_step:
            after(state, boundary)
        state.counters.micro_steps += 1
        self._tell_boundary()
        if boundary:
            overflow, norm, falls = optimizer.overflow, optimizer.grad_norm, optimizer.loss_scaler.can_fall
            skips = self.precision.skip_non_finite
            self._loss_guard.after_step(state.counters.global_steps, overflow, skips, norm, falls)
            for updated in hooks.after_update:
                updated(state)

    def _update(self, reducer: GradientReducer, optimizer: ZeroOptimizer, lr_kwargs: dict[str, Any]) -> None:
        state = self.train_state
        counters, zero = state.counters, state.values.zero_optimization
        reducer.reduce_rest()
        for hook in self.train_hooks.before_update:
            hook(state)
        unused = reducer.finish_window()
        if not zero.ignore_unused_parameters:
            check_unused(unused, self.grid, self.device)
        self.loads.check_parts()
        if state.partition.offloaded:
            raise ConfigError("step() was called while states are offloaded: call reload_states() before it")
        if state.partition.gatherer is not None:
            state.partition.gatherer.make_idle()
        try:
            optimizer.step()
        except TrainingError as error:
            told = self._loss_guard.describe()
            raise TrainingError(f"step {counters.global_steps + 1}: {error}; {told}") from None
        self._untrained.after_update()
        self._step_applied = not optimizer.overflow
        if self._step_applied:
            if state.lr_scheduler is not None:
                state.lr_scheduler.step(**lr_kwargs)
        else:
            counters.skipped_steps += 1
            log_dist(
                f"step {counters.global_steps + 1}: gradients are not finite, step skipped; "
                f"loss scale is {optimizer.loss_scale:g}",
                ranks=[0],
            )
        counters.global_steps += 1
        counters.global_samples += self._samples_of_step()
        self._backwards = 0

    def _samples_of_step(self) -> int:
        """Samples of the step over all ranks; without managed accumulation, backwards are counted."""
        sizes = self.train_state.batch_sizes
        if self.train_state.values.managed_gradient_accumulation:
            return sizes.train
        return sizes.micro * self.grid.replicas * self._backwards

    # ---------------------------------------------------------------- where windows end

    def _tell_boundary(self) -> bool:
        """Whether the running micro-batch is the last of its window; the reducer is told."""
        boundary = self.is_gradient_accumulation_boundary()
        if self._reducer is not None:
            self._reducer.at_boundary = self._syncing and boundary
        return boundary

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up locally and reduce nothing. Not for stage 2 and above."""
        if self.train_state.stage >= 2:
            raise ConfigError(
                "no_sync context manager is incompatible with ZeRO stage "
                f"{self.train_state.stage}, where no rank keeps whole gradients: use "
                "gradient_accumulation_steps, or stage 1"
            )
        if not self._syncing:
            raise ConfigError("no_sync context manager reentry is unsupported: leave the outer one out")
        self._syncing = False
        self._tell_boundary()
        try:
            yield
        finally:
            self._syncing = True
            self._tell_boundary()

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """Backward passes inside add up locally; leaving reduces their sum, once. For every ZeRO stage.

        One block belongs to one `step()`, which comes after it. From stage 2 on, a rank holds whole gradients while
        the block lasts. Collective.

        Raises:
            ConfigError: inside `no_sync` or another such block, with `managed_gradient_accumulation: false`, or in
                aligned mode, where micro-batches are added in an order of their own.
        """
        values = self.train_state.values
        _, reducer = self._trained("coalesce_grad_reduction()")
        if not values.managed_gradient_accumulation:
            raise ConfigError(
                "coalesce_grad_reduction() needs managed_gradient_accumulation: without it, step() ends a window"
            )
        if values.xtrain.aligned and self.train_state.stage >= 2:
            raise ConfigError(
                "coalesce_grad_reduction() is not for aligned mode in ZeRO stage 2 and 3: leave it out"
            )
        if not self._syncing:
            raise ConfigError(
                "coalesce_grad_reduction() cannot be nested in itself or in no_sync(): leave one out"
            )
        self._syncing, reducer.held = False, True
        self._tell_boundary()
        try:
            yield
        except BaseException:
            reducer.held = False
            reducer.discard()
            raise
        else:
            reducer.release_held()
        finally:
            self._syncing = True
            self._tell_boundary()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last before an update."""
        if self._boundary_override is not None:
            return self._boundary_override
        if not self.train_state.values.managed_gradient_accumulation:
            return self._stepping
        return self.train_state.in_window == self.train_state.batch_sizes.accumulation - 1

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide by hand where updates happen; None returns to counting."""
        if not self.train_state.values.managed_gradient_accumulation:
            raise ConfigError(
                "set_gradient_accumulation_boundary() was called, but managed_gradient_accumulation is false in the "
                "config: every step() is a boundary"
            )
        self._boundary_override = is_boundary
        self._tell_boundary()

    def was_step_applied(self) -> bool:
        """Whether the last `step()` changed the weights."""
        return self._step_applied

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients."""
        if self.train_state.optimizer is not None:
            self.train_state.optimizer.zero_grad()
        else:
            self.module.zero_grad(set_to_none)

    def train(self, mode: bool = True) -> Engine:
        """Set the module's training mode."""
        super().train(mode)
        return self

    def destroy(self) -> None:
        """Detach from the parameters, so that they can be given to another engine; release who watches.

        In stage 3 they stay sharded until then; `zero.GatheredParameters` makes them whole.
        """
        gc.release(id(self))
        self.train_hooks.release(self.train_state)
        if self._reducer is not None:
            self._reducer.detach()
        if self.train_state.partition.gatherer is not None:
            self.train_state.partition.gatherer.detach()
        if self.train_state.optimizer is not None:
            self.train_state.optimizer.unlock_memory()
