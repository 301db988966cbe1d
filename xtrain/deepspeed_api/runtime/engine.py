"""`deepspeed.runtime.engine`: the engine with DeepSpeed's methods and attributes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from xtrain.backends import Backend
from xtrain.base import missing
from xtrain.config import XtrainConfig
from xtrain.deepspeed_api.compat.callables import DeepSpeedOptimizerCallable, DeepSpeedSchedulerCallable
from xtrain.deepspeed_api.engine_actions import EngineActions
from xtrain.deepspeed_api.engine_settings import EngineSettings
from xtrain.deepspeed_api.engine_state import EngineState
from xtrain.deepspeed_api.optimizer_classes import DeepSpeedZeroOptimizer_Stage3, optimizer_class
from xtrain.metrics.metrics import Metrics
from xtrain.parallel import DataParallelGrid
from xtrain.zero.parameter_offload import ParameterOffload


class XtrainEngine(EngineActions, EngineState, EngineSettings):
    """A model with its optimizer, schedule and data-parallel training step, as `xtrain.initialize` returns it.

    Methods behave as DeepSpeed documents those of `DeepSpeedEngine`
    (https://www.deepspeed.ai/getting-started/, https://deepspeed.readthedocs.io/en/latest/training.html).

    Attributes:
        module: the user's model; its parameters are views of flat buffers.
        optimizer: a ZeroOptimizer; when neither the config nor the call names an optimizer, None, or in stage 3 a
            ParameterOffload.
        lr_scheduler: stepped once per optimizer step that was not skipped.
        global_steps, micro_steps, global_samples, skipped_steps: counters since the start of training.
        training_dataloader: of the `training_data` that was given, else None.
    """

    _optimizer_class = staticmethod(optimizer_class)
    _offload: ParameterOffload | None = None

    def __init__(
        self,
        module: nn.Module,
        config: XtrainConfig,
        backend: Backend,
        grid: DataParallelGrid,
        optimizer: Any = None,
        model_parameters: Any = None,
        lr_scheduler: Any = None,
        training_data: Dataset[Any] | None = None,
        collate_fn: Callable[..., Any] | None = None,
        mpu: Any = None,
    ) -> None:
        super().__init__(module, config, backend, grid, optimizer, model_parameters, lr_scheduler, mpu)
        if self.train_state.stage == 3:
            offload = ParameterOffload(module, self.train_state.partition.gatherer)
            if isinstance(trained := self.train_state.optimizer, DeepSpeedZeroOptimizer_Stage3):
                trained.parameter_offload = offload
            else:
                self._offload = offload
            self.train_hooks.on_destroy.append(lambda _: offload.destroy())
        self.train_hooks.after_step.append(self._print_step)
        self.train_metrics = Metrics(self.train_state, self.train_hooks, self)
        self.training_dataloader = (
            None if training_data is None else self.deepspeed_io(training_data, collate_fn=collate_fn)
        )

    @property
    def optimizer(self) -> Any:
        """What updates the model. Where nothing does, in stage 3, what takes the hooks off, which DeepSpeed puts here:
        libraries that generate look for it."""
        trained = self.train_state.optimizer
        return self._offload if trained is None else trained

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self.train_state.optimizer = optimizer

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


DeepSpeedEngine = XtrainEngine

__all__ = ["DeepSpeedEngine", "DeepSpeedOptimizerCallable", "DeepSpeedSchedulerCallable", "XtrainEngine"]
