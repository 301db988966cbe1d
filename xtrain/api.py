"""`initialize` and `add_config_arguments`: the two calls every DeepSpeed script makes."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from xtrain import comm
from xtrain.activation_checkpointing import checkpointing, random_states
from xtrain.align import run_recording
from xtrain.backends import Backend
from xtrain.base import log
from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.base.log import log_dist
from xtrain.base.run_folder import RUN_DIR_VARIABLE
from xtrain.config import XtrainConfig, load_config
from xtrain.config.backend import choose_backend
from xtrain.deepspeed_engine import start as deepspeed_engine
from xtrain.engine import leave_on_signal
from xtrain.integrity import corruption_check
from xtrain.integrity import fault_injection as faults
from xtrain.parallel import grid_from_mpu
from xtrain.runtime.engine import XtrainEngine
from xtrain.shims import mixed
from xtrain.zero import init as zero_init
from xtrain.zero.optimizer import ZeroOptimizer


def _one_config(args: Any, config: Any, config_params: Any) -> Any:
    """The one config among the call's arguments and `args.deepspeed_config`."""
    from_args = getattr(args, "deepspeed_config", None) or getattr(args, "deepscale_config", None)
    from_call = config if config is not None else config_params
    if from_args is not None and from_call is not None:
        raise ConfigError(
            f"two configs were given: --deepspeed_config {from_args} and the config argument of initialize(): pass one"
        )
    chosen = from_args if from_args is not None else from_call
    if chosen is None:
        raise ConfigError(
            "no config was given: pass --deepspeed_config FILE, or initialize(config=...) with a dictionary or path"
        )
    return chosen


def _start(
    checked: XtrainConfig, distributed_port: int, dist_init_required: bool | None, mpu: Any
) -> Backend:
    """Everything before there is an engine: log, backend, process group, random states."""
    log.configure(checked.values.log_level)
    backend = choose_backend(checked)
    backend.prepare(comm.find_local_rank(), checked.values.xtrain.aligned)
    comm.init_distributed(
        dist_backend=backend.collectives.process_group_backend,
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )
    comm.check_same("backend", backend.name)
    comm.tell_other_library(backend.name, backend.collectives.process_group_backend)
    random_states.use_backend(backend)
    if "activation_checkpointing" in checked.values.model_fields_set:
        checkpointing.configure_from_engine(checked.values.activation_checkpointing, mpu)
    for warning in checked.warnings:
        log_dist(warning, ranks=[0], level=logging.WARNING)
    return backend


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    model_parameters: Any = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = comm.TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | Path | dict[str, Any] | None = None,
    mesh_param: Any = None,
    config_params: str | Path | dict[str, Any] | None = None,
) -> tuple[XtrainEngine, ZeroOptimizer | None, DataLoader[Any] | None, Any]:
    """Wrap a model in a training engine, with `deepspeed.initialize`'s arguments and return values.

    Args:
        args: may carry `deepspeed_config`, the path of the config.
        model: any torch module.
        optimizer: a torch optimizer over the model's parameters, or a callable that builds one from
            parameter groups; None takes the config's.
        model_parameters: parameters, or parameter groups, for the config's optimizer; None means all.
        training_data: a map-style dataset; a loader of this rank's micro-batches is returned for it.
        lr_scheduler: an object with `step()`, or a callable that builds one from the optimizer; None
            takes the config's.
        distributed_port: port of rank 0 when the environment names none.
        mpu: the script's process grid: see `xtrain.parallel.grid_from_mpu` for what it answers, and
            `xtrain.parallel.ProcessGrid` for one that is there.
        dist_init_required: False asserts that the process group exists already.
        collate_fn: for `training_data`.
        config, config_params: path or dictionary; one of them, or `args.deepspeed_config`.
        mesh_param: for DeepSpeed's engine; not there yet in xtrain's own.

    Returns:
        (engine, optimizer, training dataloader or None, scheduler or None); DeepSpeed's own with
        `"xtrain": {"engine": "deepspeed"}`.

    Raises:
        ConfigError: a mistake in the config or the arguments, in one sentence.
        NotImplementedYetError: a DeepSpeed feature that xtrain does not have yet.
        BackendError: the backend asked for cannot be used here.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"initialize() needs model=<torch module>, got {type(model).__name__}")
    checked = load_config(_one_config(args, config, config_params))
    if mesh_param is not None and checked.values.xtrain.engine == "native":
        raise NotImplementedYetError("initialize(mesh_param=...)", "leave it out, or pass an mpu")
    backend = _start(checked, distributed_port, dist_init_required, mpu)
    if checked.values.xtrain.engine == "deepspeed":
        return deepspeed_engine.initialize(
            checked,
            backend,
            args,
            model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            distributed_port=distributed_port,
            mpu=mpu,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            mesh_param=mesh_param,
        )
    mixed.check({"model": model, "optimizer": optimizer, "lr_scheduler": lr_scheduler}, model.parameters())
    for notice in checked.notices:
        log_dist(notice, ranks=[0])
    if checked.values.dump_state:
        log_dist(f"config: {checked.values.model_dump_json(indent=1)}", ranks=[0])
    with zero_init.suspended():
        engine = XtrainEngine(
            model,
            checked,
            backend,
            grid_from_mpu(mpu),
            optimizer=optimizer,
            model_parameters=model_parameters,
            lr_scheduler=lr_scheduler,
            training_data=training_data,
            collate_fn=collate_fn,
            mpu=mpu,
        )
    faults.attach(engine.train_state, engine.train_hooks)
    corruption_check.attach(engine.train_state, engine.train_hooks, checked.values.xtrain.sdc_check)
    run_recording.attach(engine, checked, backend, {"engine": "native"}, engine.grid.model.reports_loss)
    if RUN_DIR_VARIABLE not in os.environ:
        leave_on_signal.attach(engine)
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--deepspeed` and `--deepspeed_config` (and their old spellings) to a script's parser."""
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument(
        "--deepspeed", action="store_true", help="for the script's own use; changes nothing here"
    )
    group.add_argument("--deepspeed_config", type=str, default=None, help="path of the DeepSpeed JSON config")
    group.add_argument("--deepscale", action="store_true", help=argparse.SUPPRESS)
    group.add_argument("--deepscale_config", type=str, default=None, help=argparse.SUPPRESS)
    return parser
