"""What a script may do with its engine besides training: compile, save plain weights, change batch sizes.

A mixin of XtrainEngine. Methods of DeepSpeedEngine whose feature is not there yet raise and say what to use.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xtrain.agree import together
from xtrain.buffers import is_dense
from xtrain.config import BatchSizes, XtrainConfig, solve_batch_sizes
from xtrain.errors import CheckpointError, ConfigError, NotImplementedYetError
from xtrain.files import atomic_path
from xtrain.log import log_dist
from xtrain.parallel import DataParallelGrid
from xtrain.zero.weights import whole_state_dict

if TYPE_CHECKING:
    from xtrain.zero.partition import Partition
    from xtrain.zero.reducer import GradientReducer


def _not_yet(name: str, instead: str) -> Callable[..., Any]:
    def method(self: Extras, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedYetError(f"engine.{name}()", instead)

    method.__doc__ = f"Not there yet: {instead}."
    return method


def _standalone(state: dict[str, Any]) -> dict[str, Any]:
    """Copies on the host, so that no flat buffer is written with them; tied tensors stay tied."""
    copies: dict[Any, torch.Tensor] = {}

    def copied(value: Any) -> Any:
        if not torch.is_tensor(value):
            return value
        if not is_dense(value):
            return value.detach().to("cpu", copy=True)
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies or not value.numel():
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return {name: copied(value) for name, value in state.items()}


class Extras:
    """Actions of XtrainEngine; the attributes below are the engine's."""

    xtrain_config: XtrainConfig
    batch_sizes: BatchSizes
    grid: DataParallelGrid
    module: nn.Module
    global_rank: int
    micro_steps: int
    optimizer: Any
    partition: Partition
    _reducer: GradientReducer
    _compiled = False

    # ---------------------------------------------------------------- batch sizes

    def _between_steps(self, what: str) -> None:
        if self.micro_steps % self.batch_sizes.accumulation:
            raise ConfigError(f"{what}() was called in the middle of an accumulation window")

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the number of accumulation steps."""
        self._between_steps("set_train_batch_size")
        self.batch_sizes = solve_batch_sizes(
            train_batch_size, self.batch_sizes.micro, None, self.grid.replicas
        )
        self.micro_steps = 0

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch, and the global batch with it; the number of accumulation steps stays.

        A dataloader that exists keeps its batch size: make another with `deepspeed_io`.
        """
        self._between_steps("set_train_micro_batch_size")
        accumulation = self.batch_sizes.accumulation
        self.batch_sizes = solve_batch_sizes(None, micro_batch_size, accumulation, self.grid.replicas)

    # ---------------------------------------------------------------- gradients and memory

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Reduce the gradients of the script's own backward now; `step()` would otherwise.

        Outside of an accumulation boundary it only ends the micro-batch, as in DeepSpeed. After
        `engine.backward()` there is nothing left to do.

        Args:
            bucket_size: accepted for compatibility; buckets are cut at initialisation.
        """
        if self.optimizer is None:
            raise ConfigError(
                "allreduce_gradients() needs an optimizer: gradients are not collected without one"
            )
        self._reducer.close_micro_batch()

    def collect_python_gc(self) -> int:
        """Collect cyclic garbage now, which `disable_python_gc` leaves to the script; how many objects went."""
        return gc.collect()

    def empty_partition_cache(self) -> None:
        """Give back the memory of gathered parameters that are not in use; below stage 3 there are none."""
        if self.partition.gatherer is not None:
            self.partition.gatherer.end_iteration()

    # ---------------------------------------------------------------- compilation

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the module with torch.compile; a second call does nothing.

        Args:
            backend: of torch.compile; it wins over one in `compile_kwargs`.
            compile_kwargs: further arguments of torch.compile.
            schedule, compiled_autograd_enabled: not there yet.

        Raises:
            ConfigError: in aligned mode, where kernels must not be fused.
        """
        if schedule is not None:
            raise NotImplementedYetError(
                "engine.compile(schedule=...)", "leave it out: it belongs to DeepCompile"
            )
        if compiled_autograd_enabled:
            raise NotImplementedYetError(
                "engine.compile(compiled_autograd_enabled=True)",
                "leave it out: backward of compiled code is compiled",
            )
        if self.xtrain_config.values.xtrain.aligned:
            raise ConfigError(
                "engine.compile() fuses operations, which rounds differently on each chip: leave it out in aligned mode"
            )
        if not self._compiled:
            self.module.compile(**{**(compile_kwargs or {}), "backend": backend})
            self._compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compiled

    def is_deepcompile_active(self) -> bool:
        """Always False: there is no DeepCompile."""
        return False

    # ---------------------------------------------------------------- plain weights

    def save_16bit_model(
        self,
        save_dir: str,
        save_filename: str = "pytorch_model.bin",
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """Write the module's weights, in the dtype they are trained in, as one `torch.save` file.

        Every rank must call it; rank 0 writes. The file appears complete or not at all.

        Returns:
            True; False, and nothing is written, in stage 3 without stage3_gather_16bit_weights_on_model_save.

        Raises:
            CheckpointError: on every rank, when the file cannot be written.
        """
        if self.grid.model.size > 1:
            raise NotImplementedYetError(
                "save_16bit_model() of a model whose parts are on several ranks",
                "use save_checkpoint(), or write engine.module_state_dict() on each",
            )
        zero = self.xtrain_config.values.zero_optimization
        path = Path(save_dir) / save_filename
        if zero.stage == 3 and not zero.gather_16bit_weights_on_model_save:
            log_dist(
                f"{path} was not written: set zero_optimization.stage3_gather_16bit_weights_on_model_save to true",
                ranks=[0],
            )
            return False
        state = self._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters)

        def write() -> None:
            if state is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as temporary:
                    torch.save(_standalone(state), temporary)

        together(write, f"writing {path}", CheckpointError)
        return True

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        """The whole weights on rank 0, None elsewhere; every rank must call it. Hugging Face's libraries do."""
        first = self.global_rank == 0
        state = whole_state_dict(self.module, keep=first, exclude_frozen=exclude_frozen_parameters)
        return state if first else None

    def save_fp16_model(self, save_dir: str, save_filename: str = "pytorch_model.bin") -> bool:
        """The old name of `save_16bit_model`."""
        return self.save_16bit_model(save_dir, save_filename)

    # ---------------------------------------------------------------- not there yet

    coalesce_grad_reduction = _not_yet(
        "coalesce_grad_reduction",
        "run all but the last backward inside `with engine.no_sync():` (stages 0 and 1)",
    )
    clip_fp32_gradients = _not_yet("clip_fp32_gradients", "set gradient_clipping: step() clips")
    set_data_post_process_func = _not_yet("set_data_post_process_func", "pass collate_fn to initialize()")
    set_custom_curriculum_learning_schedule = _not_yet(
        "set_custom_curriculum_learning_schedule", "sample in the script"
    )
    random_ltd_initialize = _not_yet("random_ltd_initialize", "drop tokens in the model")
    load_moe_state_dict = _not_yet("load_moe_state_dict", "use load_checkpoint")
    register_compile_pass = _not_yet("register_compile_pass", "pass a backend function to engine.compile()")
    get_compile_time = _not_yet("get_compile_time", "use torch._dynamo.utils.compile_times()")
