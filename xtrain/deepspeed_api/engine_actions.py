"""What a script may do with its engine besides training: save and load, compile, change batch sizes, offload.

Methods of DeepSpeedEngine; those whose feature is not there yet raise and say what to use.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.checkpoint import contents, model_states, plain_weights, read, write
from xtrain.checkpoint.verify import Wanted
from xtrain.config import solve_batch_sizes
from xtrain.engine.build import ALIGNED_IS_NOT_COMPILED
from xtrain.engine.dataloader import make_dataloader
from xtrain.engine.engine import Engine
from xtrain.zero.names import uncompiled
from xtrain.zero.offload import OffloadDeviceEnum, offload_states, reload_states
from xtrain.zero.weights import custom_load, load_whole_state_dict, whole_state_dict


def _not_yet(name: str, instead: str) -> Callable[..., Any]:
    def method(self: EngineActions, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedYetError(f"engine.{name}()", instead)

    method.__doc__ = f"Not there yet: {instead}."
    return method


class EngineActions(Engine):
    """Actions under DeepSpeedEngine's names."""

    _compiled = False

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        """See Engine.coalesce_grad_reduction.

        Raises:
            NotImplementedYetError: a subclass has a pipeline, whose schedule runs the backward passes.
        """
        if self.pipeline_parallelism:
            raise NotImplementedYetError(
                "coalesce_grad_reduction() with pipeline parallelism", "leave the block out"
            )
        with super().coalesce_grad_reduction():
            yield

    # ---------------------------------------------------------------- batch sizes

    def _between_steps(self, what: str) -> None:
        if self.train_state.in_window:
            raise ConfigError(f"{what}() was called in the middle of an accumulation window")

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the global batch by changing the number of accumulation steps."""
        self._between_steps("set_train_batch_size")
        state = self.train_state
        state.batch_sizes = solve_batch_sizes(
            train_batch_size, state.batch_sizes.micro, None, self.grid.replicas
        )
        state.counters.micro_steps = 0
        self._tell_boundary()

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the micro-batch, and the global batch with it; the number of accumulation steps stays.

        A dataloader that exists keeps its batch size: make another with `deepspeed_io`.
        """
        self._between_steps("set_train_micro_batch_size")
        state = self.train_state
        state.batch_sizes = solve_batch_sizes(
            None, micro_batch_size, state.batch_sizes.accumulation, self.grid.replicas
        )

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
            batch_size or self.train_state.batch_sizes.micro,
            self.grid,
            shuffle=route == "train",
            drop_last=self.xtrain_config.values.dataloader_drop_last,
            collate_fn=collate_fn,
            workers=num_local_io_workers or 0,
            sampler=data_sampler,
            pin_memory=pin_memory and not self.backend.runtime.host_memory,
        )

    # ---------------------------------------------------------------- gradients and memory

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """Reduce the gradients of the script's own backward now; `step()` would otherwise.

        Outside of an accumulation boundary it only ends the micro-batch, as in DeepSpeed. After
        `engine.backward()` there is nothing left to do.

        Args:
            bucket_size: accepted for compatibility; buckets are cut at initialisation.
        """
        if self._reducer is None:
            raise ConfigError(
                "allreduce_gradients() needs an optimizer: gradients are not collected without one"
            )
        self._tell_boundary()
        self._reducer.close_micro_batch()

    def collect_python_gc(self) -> int:
        """Collect cyclic garbage now, which `disable_python_gc` leaves to the script; how many objects went."""
        return gc.collect()

    def empty_partition_cache(self) -> None:
        """Give back the memory of gathered parameters that are not in use; below stage 3 there are none."""
        if (gatherer := self.train_state.partition.gatherer) is not None:
            gatherer.end_iteration()

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
        offload_states(self.train_state, include, device, pin_memory)

    def reload_states(self, non_blocking: bool = False) -> None:
        """Undo `offload_states`."""
        reload_states(self.train_state)

    # ---------------------------------------------------------------- compilation

    def compile(
        self,
        backend: str | Callable[..., Any] = "inductor",
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the module with torch.compile; a second call does nothing.

        In stage 3 the graph breaks where parameters are gathered and released: what runs between is compiled. Names
        in checkpoints and state dictionaries are those of the module that is not compiled.

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
            raise ConfigError(ALIGNED_IS_NOT_COMPILED.format(what="engine.compile()"))
        if not self._compiled:
            if uncompiled(self.module) is self.module:  # else it is what torch.compile has made
                self.module.compile(**{**(compile_kwargs or {}), "backend": backend})
            self._compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called, or the module was what torch.compile returns."""
        return self._compiled or uncompiled(self.module) is not self.module

    def is_deepcompile_active(self) -> bool:
        """Always False: there is no DeepCompile."""
        return False

    # ---------------------------------------------------------------- weights and checkpoints

    def module_state_dict(
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        exclude_frozen_parameters: bool = False,
    ) -> dict[str, Any]:
        """The module's state dictionary, whole on every rank; in stage 3 every rank must call it.

        Args:
            destination: a dictionary to add to, and to return.
            prefix: put before every name.
            keep_vars: give the parameters themselves, not detached; those divided in stage 3 are copies anyway.
            exclude_frozen_parameters: leave parameters without gradient out.
        """
        state = whole_state_dict(self.module, exclude_frozen=exclude_frozen_parameters, keep_vars=keep_vars)
        result: dict[str, Any] = {} if destination is None else destination
        result.update((prefix + name, value) for name, value in state.items())
        return result

    def load_module_state_dict(
        self,
        checkpoint: Mapping[str, Any],
        strict: bool = True,
        custom_load_fn: Callable[..., None] | None = None,
        fetch_z3_params: bool = False,
        z3_params_to_fetch: Collection[nn.Parameter] | None = None,
        allowed_missing_keys: Collection[str] | None = None,
    ) -> None:
        """Load the module's weights; the masters follow. In stage 3 every rank gives whole tensors.

        Args:
            checkpoint: a dictionary whose `"module"` is the state dictionary, as DeepSpeed has it, or the
                state dictionary itself.
            strict: names must be the same.
            custom_load_fn: called with `src=` the state dictionary and `dst=` the module, instead of loading.
            fetch_z3_params, z3_params_to_fetch: accepted; whole tensors are cut for each rank without being
                gathered first.
            allowed_missing_keys: names that may be absent even when `strict`.

        Raises:
            RuntimeError: names or shapes differ.
        """
        inner = checkpoint.get("module")
        state = dict(inner if isinstance(inner, Mapping) else checkpoint)
        if custom_load_fn is not None:
            custom_load(self.module, state, custom_load_fn)
        else:
            load_whole_state_dict(self.module, state, strict, allowed_missing_keys or ())
        for group in self.train_state.partition.trained:
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
                dictionaries, tensors, numpy's arrays and scalars, dates and paths; also in the containers of
                `collections` and in Namespaces.
            save_latest: let `save_dir/latest` name this checkpoint.
            exclude_frozen_parameters: leave parameters without gradient out.

        Raises:
            ConfigError: `save_dir` is empty, or the ranks gave different tags and `tag_validation` is "Fail".
            CheckpointError: on every rank, when one could not write its part; what existed stays.
        """
        name = f"global_step{self.train_state.counters.global_steps}" if tag is None else str(tag)
        self.loads.check()
        write.save(
            self.train_state,
            save_dir,
            name,
            client_state or {},
            save_latest,
            exclude_frozen_parameters,
        )
        self.checkpoint_folder = save_dir
        return True

    def _get_optimizer_ckpt_name(self, checkpoints_path: str, tag: str, expp_rank: int = 0) -> str:
        """Path of the file with what data-parallel rank `expp_rank` owns; DeepSpeed's private name, which tools use."""
        ranks = self.grid.size if self.xtrain_config.values.zero_optimization.stage else 1
        return str(Path(checkpoints_path) / str(tag) / contents.optimizer_file(expp_rank, ranks))

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

        Everything is verified before anything of the engine changes. Ranks need not call it at the same time, unless
        `custom_load_fn` is given in stage 3: those that load alone compare what they have loaded before gradients are
        next reduced, and before a checkpoint is saved (docs/decisions/0008-loading-alone.md).

        Returns:
            (path, client state); (None, None) with a warning when `tag` is None and `load_dir` has no file
            `latest`, so that scripts may always pass the folder they save to.

        Raises:
            CheckpointError: the tag is not there, the checkpoint is damaged or does not fit the model, or the
                ranks have found different ones.
        """
        wanted = Wanted(
            strict=load_module_strict,
            optimizer=load_optimizer_states and not load_module_only,
            scheduler=load_lr_scheduler_states and not load_module_only,
            counters=not load_module_only,
            custom=custom_load_fn is not None,
        )
        if not load_module_only:
            self.checkpoint_folder = load_dir
        try:
            return read.load(self.train_state, self.loads, load_dir, tag, wanted, custom_load_fn)
        finally:
            self._tell_boundary()
            for hook in self.train_hooks.on_load:
                hook(self.train_state)

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
        return plain_weights.save_16bit(
            self.train_state, Path(save_dir) / save_filename, exclude_frozen_parameters
        )

    def _zero3_consolidated_16bit_state_dict(
        self, exclude_frozen_parameters: bool = False
    ) -> dict[str, Any] | None:
        """The whole weights on rank 0, None elsewhere; every rank must call it. Hugging Face's libraries do."""
        return plain_weights.consolidated(self.module, exclude_frozen_parameters)

    def _create_checkpoint_file(self, save_dir: str, tag: str, zero_checkpoint: bool) -> bool:
        """Make the folder of a checkpoint. Private in DeepSpeed; scripts that write files of their own call it."""
        model_states.make_folder(Path(save_dir) / str(tag))
        return True

    def _get_ckpt_name(self, checkpoints_path: str, tag: str, mp_placeholder: str | None = None) -> str:
        """The file that `_save_checkpoint` writes; with a placeholder, the pattern of those of all parts."""
        file = model_states.file_of(self.train_state, Path(checkpoints_path) / str(tag))
        return str(
            file if mp_placeholder is None else file.with_name(f"mp_rank_{mp_placeholder}_model_states.pt")
        )

    def _save_checkpoint(
        self,
        save_dir: str,
        tag: str,
        client_state: dict[str, Any] | None = None,
        exclude_frozen_parameters: bool = False,
    ) -> None:
        """Write weights and the script's own state to `_get_ckpt_name()`, without optimizer states.

        Private in DeepSpeed; scripts whose checkpoints have no optimizer call it, below stage 3 on one rank alone.
        """
        folder = Path(save_dir) / str(tag)
        model_states.save(self.train_state, folder, client_state or {}, exclude_frozen_parameters)

    def save_fp16_model(self, save_dir: str, save_filename: str = "pytorch_model.bin") -> bool:
        """The old name of `save_16bit_model`."""
        return self.save_16bit_model(save_dir, save_filename)

    def _backward_epilogue(self) -> None:
        """Average the gradients over the ranks, if the window ends here: after a backward pass of the script's own.

        DeepSpeed's private name, which scripts call when several engines share a loss. `step()` does it, too.
        """
        _, reducer = self._trained("_backward_epilogue()")
        reducer.settle()

    # ---------------------------------------------------------------- not there yet

    clip_fp32_gradients = _not_yet("clip_fp32_gradients", "set gradient_clipping: step() clips")
    set_data_post_process_func = _not_yet("set_data_post_process_func", "pass collate_fn to initialize()")
    set_custom_curriculum_learning_schedule = _not_yet(
        "set_custom_curriculum_learning_schedule", "sample in the script"
    )
    random_ltd_initialize = _not_yet("random_ltd_initialize", "drop tokens in the model")
    load_moe_state_dict = _not_yet("load_moe_state_dict", "use load_checkpoint")
    register_compile_pass = _not_yet("register_compile_pass", "pass a backend function to engine.compile()")
    get_compile_time = _not_yet("get_compile_time", "use torch._dynamo.utils.compile_times()")
