"""The engine: forward, backward, step, with DeepSpeedEngine's methods and counters.

It reads top to bottom like a training loop. State and collectives live in xtrain.zero, files in
xtrain.checkpoint, one-time set-up in xtrain.setup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from xtrain import comm, setup
from xtrain.aligned_random import AlignedRandom
from xtrain.backends import Backend
from xtrain.checkpoint import read, write
from xtrain.compat import missing
from xtrain.config import BatchSizes, XtrainConfig, solve_batch_sizes
from xtrain.dataloader import make_dataloader
from xtrain.errors import ConfigError
from xtrain.inquiries import Inquiries
from xtrain.log import log_dist
from xtrain.optim import build_optimizer, check_elementwise
from xtrain.parallel import DataParallelGrid
from xtrain.precision import make_loss_scale, make_policy
from xtrain.schedulers import build_scheduler
from xtrain.zero.flat import FlatGroup
from xtrain.zero.optimizer import ZeroOptimizer
from xtrain.zero.reducer import GradientReducer


class XtrainEngine(Inquiries, nn.Module):
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
        self.mpu = mpu
        self.batch_sizes: BatchSizes = solve_batch_sizes(
            values.train_batch_size,
            values.train_micro_batch_size_per_gpu,
            values.gradient_accumulation_steps,
            grid.size,
        )
        self.global_steps = self.micro_steps = self.global_samples = self.skipped_steps = 0
        self._boundary_override: bool | None = None
        self._syncing = True
        self._step_applied = False

        self.local_rank = comm.get_local_rank()
        self.global_rank = comm.get_rank()
        self.world_size = comm.get_world_size()
        self.device = backend.runtime.device(self.local_rank)
        setup.check_agreement(module, config, grid)
        self.precision = make_policy(values)
        self._random = AlignedRandom(values.xtrain.seed, self._place) if values.xtrain.aligned else None
        setup.place_module(module, self.device, self.precision.module, backend)
        self.module = module

        self.flat_groups: list[FlatGroup] = []
        self.optimizer: ZeroOptimizer | None = None
        self.basic_optimizer = self._basic_optimizer(optimizer, model_parameters)
        if self.basic_optimizer is not None:
            self._partition(self.basic_optimizer)
        setup.broadcast_states(module, self.flat_groups, grid)
        self.lr_scheduler = self._scheduler(lr_scheduler)
        self.training_dataloader = (
            None if training_data is None else self.deepspeed_io(training_data, collate_fn=collate_fn)
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
            built = build_optimizer(values.optimizer, groups, self.backend.zero.update_chunk)
        check_elementwise(built, values.zero_allow_untested_optimizer)
        return built

    def _partition(self, basic_optimizer: torch.optim.Optimizer) -> None:
        values, backend, grid = self.xtrain_config.values, self.backend, self.grid
        zero = values.zero_optimization
        # Aligned mode adds micro-batches inside a rank first, for which every rank keeps whole gradients.
        shard = zero.stage >= 2 and not (self.precision.aligned and self.batch_sizes.accumulation > 1)
        gradients = setup.flatten(self.module, basic_optimizer, zero, self.precision, backend, grid, shard)
        self.flat_groups = [item.group for item in gradients]
        trained = {param for group in self.flat_groups for param in group.members}
        self._untrained = [p for p in self.module.parameters() if p.requires_grad and p not in trained]
        order = {param: index for index, param in enumerate(self.module.parameters())}
        for param in trained - order.keys():
            order[param] = len(order)
        self._reducer = GradientReducer(
            gradients,
            order,
            is_boundary=lambda: self._syncing and self.is_gradient_accumulation_boundary(),
            every_backward=shard,
            overlap=backend.zero.overlap_comm if zero.overlap_comm is None else zero.overlap_comm,
        )
        self.optimizer = ZeroOptimizer(
            basic_optimizer,
            gradients,
            make_loss_scale(values.fp16),
            backend,
            grid.group,
            clip=values.gradient_clipping,
            skip_non_finite=self.precision.skip_non_finite,
            round_norm=self.precision.aligned,
        )
        self.optimizer.discard = self._reducer.discard

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
        collate_fn: Callable[..., Any] | None = None,
        num_local_io_workers: int = 0,
        data_sampler: Any = None,
    ) -> DataLoader[Any]:
        """A loader of this rank's micro-batches; shuffled for `route="train"`."""
        return make_dataloader(
            dataset,
            batch_size or self.batch_sizes.micro,
            self.grid,
            shuffle=route == "train",
            drop_last=self.xtrain_config.values.dataloader_drop_last,
            collate_fn=collate_fn,
            workers=num_local_io_workers,
            sampler=data_sampler,
        )

    # ---------------------------------------------------------------- the training step

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the model."""
        if self._random is None or not self.module.training:
            return self.module(*inputs, **kwargs)
        with self._random:
            return self.module(*inputs, **kwargs)

    def _place(self) -> tuple[int, int]:
        """(step, slot) of the running micro-batch; a slot is rank x accumulation steps + index."""
        accumulation = self.batch_sizes.accumulation
        return self.global_steps, self.grid.rank * accumulation + self.micro_steps % accumulation

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
        if scale_wrt_gas and self.batch_sizes.accumulation > 1:
            loss = loss / self.batch_sizes.accumulation
        with self._reducer.backward():
            self.scale(loss).backward(retain_graph=retain_graph)
        return loss

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss times the loss scale, for scripts that call `.backward()` themselves.

        Such scripts also divide by the accumulation steps themselves.
        """
        factor = self.loss_scale()
        return loss if factor == 1.0 else loss.float() * factor

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Close a micro-batch; at a boundary, update the weights and the schedule."""
        if not self._syncing:
            raise ConfigError("step() was called inside no_sync(): leave the context before it")
        if self.optimizer is None:
            raise ConfigError("step() needs an optimizer: name one in the config or pass it to initialize()")
        if not self._reducer.ran_backward:
            raise ConfigError(
                "step() was called, but no gradient has arrived since the last one: call backward(loss)"
            )
        self._reducer.close_micro_batch()
        self._step_applied = False
        if self.is_gradient_accumulation_boundary():
            self._update(lr_kwargs or {})
        self.micro_steps += 1

    def _update(self, lr_kwargs: dict[str, Any]) -> None:
        assert self.optimizer is not None
        unused = self._reducer.finish_window()
        if unused and not self.xtrain_config.values.zero_optimization.ignore_unused_parameters:
            raise ConfigError(
                f"parameter {unused[0]!r} got no gradient on rank {self.global_rank}: "
                "use it in the loss, freeze it, or set zero_optimization.ignore_unused_parameters to true"
            )
        self.optimizer.step()
        for param in self._untrained:
            param.grad = None
        self._step_applied = not self.optimizer.overflow
        if self._step_applied:
            if self.lr_scheduler is not None:
                self.lr_scheduler.step(**lr_kwargs)
        else:
            self.skipped_steps += 1
            log_dist(
                f"step {self.global_steps + 1}: gradient norm is not finite, step skipped; "
                f"loss scale is {self.loss_scale():g}",
                ranks=[0],
            )
        self.global_steps += 1
        self.global_samples += self.batch_sizes.train
        every = self.xtrain_config.values.steps_per_print
        if every and self.global_steps % every == 0:
            log_dist(f"step={self.global_steps}, skipped={self.skipped_steps}, lr={self.get_lr()}", ranks=[0])

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside add up locally and reduce nothing. Not for stage 2 and above."""
        if self.zero_optimization_stage() >= 2:
            raise ConfigError(
                f"no_sync() cannot work in ZeRO stage {self.zero_optimization_stage()}, where no rank keeps whole "
                "gradients: use gradient_accumulation_steps, or stage 1"
            )
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro-batch is the last before an update."""
        if self._boundary_override is not None:
            return self._boundary_override
        return (self.micro_steps + 1) % self.batch_sizes.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool | None) -> None:
        """Decide by hand where updates happen; None returns to counting."""
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

    # ---------------------------------------------------------------- weights and checkpoints

    def module_state_dict(self, exclude_frozen_parameters: bool = False) -> dict[str, Any]:
        """The module's state dictionary, whole on every rank."""
        state = self.module.state_dict()
        if exclude_frozen_parameters:
            frozen = {name for name, param in self.module.named_parameters() if not param.requires_grad}
            state = {name: value for name, value in state.items() if name not in frozen}
        return state

    def load_module_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load the module's weights; the masters follow."""
        self.module.load_state_dict(state_dict, strict=strict)
        for group in self.flat_groups:
            group.refresh_masters()

    def save_checkpoint(
        self,
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write a checkpoint under `save_dir/tag`; every rank must call it.

        The directory appears complete or not at all; see xtrain.checkpoint for what is in it.

        Args:
            tag: name of the checkpoint; None means `global_step{N}`.
            client_state: what the script wants back from `load_checkpoint`: numbers, strings, lists,
                dictionaries and tensors.
            save_latest: let `save_dir/latest` name this checkpoint.
            exclude_frozen_parameters: leave parameters without gradient out.
        """
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        write.save(self, save_dir, name, client_state or {}, save_latest, exclude_frozen_parameters)
        return True

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., None] | None = None,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Load a checkpoint that any number of ranks and ZeRO stage has written.

        Returns:
            (path, client state); (None, None) with a warning when `tag` is None and `load_dir` does not
            exist or is empty, so that scripts may always pass the folder they save to.

        Raises:
            CheckpointError: the folder holds no checkpoint, is damaged, or does not fit the model.
        """
        return read.load(
            self,
            load_dir,
            tag,
            strict=load_module_strict,
            optimizer_states=load_optimizer_states and not load_module_only,
            scheduler_states=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
            custom_load_fn=custom_load_fn,
        )

    def destroy(self) -> None:
        """Detach from the parameters, so that they can be given to another engine."""
        if self.optimizer is not None:
            self._reducer.detach()
