"""What goes out of an engine and back in: the module's weights by name, and checkpoints.

A mixin of XtrainEngine. Files are xtrain.checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from xtrain.checkpoint import layout, read, write
from xtrain.checkpoint.verify import Wanted
from xtrain.config import XtrainConfig
from xtrain.parallel import DataParallelGrid
from xtrain.zero.weights import custom_load, load_whole_state_dict, whole_state_dict

if TYPE_CHECKING:
    from xtrain.engine import XtrainEngine
    from xtrain.zero.partition import Partition


class Saving:
    """Weights and checkpoints of XtrainEngine; the attributes below are the engine's."""

    module: nn.Module
    xtrain_config: XtrainConfig
    grid: DataParallelGrid
    global_steps: int
    partition: Partition

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
        for group in self.partition.trained:
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
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        write.save(
            cast("XtrainEngine", self),
            save_dir,
            name,
            client_state or {},
            save_latest,
            exclude_frozen_parameters,
        )
        return True

    def _get_optimizer_ckpt_name(self, checkpoints_path: str, tag: str, expp_rank: int = 0) -> str:
        """Path of the file with what data-parallel rank `expp_rank` owns; DeepSpeed's private name, which tools use."""
        ranks = self.grid.size if self.xtrain_config.values.zero_optimization.stage else 1
        return str(Path(checkpoints_path) / str(tag) / layout.optimizer_file(expp_rank, ranks))

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
        return read.load(cast("XtrainEngine", self), load_dir, tag, wanted, custom_load_fn)
