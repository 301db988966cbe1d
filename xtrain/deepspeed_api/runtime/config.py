"""`DeepSpeedConfig`: a checked config with DeepSpeed's attribute names, for scripts that read it themselves.

The engine does not use it: what there is to configure is in xtrain.config.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xtrain import comm
from xtrain.base.errors import ConfigError as DeepSpeedConfigError
from xtrain.base.errors import NotImplementedYetError
from xtrain.base.log import logger
from xtrain.config import Config, load_config, solve_batch_sizes
from xtrain.metrics.monitor.config import DeepSpeedMonitorConfig
from xtrain.precision.policy import DTYPES

__all__ = [
    "ADAGRAD_OPTIMIZER",
    "ADAMW_OPTIMIZER",
    "ADAM_OPTIMIZER",
    "ADAM_W_MODE",
    "ADAM_W_MODE_DEFAULT",
    "DEEPSPEED_OPTIMIZERS",
    "LAMB_OPTIMIZER",
    "LION_OPTIMIZER",
    "MUADAMW_OPTIMIZER",
    "MUADAM_OPTIMIZER",
    "MUON_OPTIMIZER",
    "MUSGD_OPTIMIZER",
    "TORCH_ADAM_PARAM",
    "CommsConfig",
    "DeepSpeedConfig",
    "DeepSpeedConfigError",
    "DtypeEnum",
    "get_gradient_accumulation_steps",
    "get_gradient_clipping",
    "get_log_level",
    "get_train_batch_size",
    "get_train_micro_batch_size_per_gpu",
]

ADAGRAD_OPTIMIZER = "adagrad"
ADAM_OPTIMIZER = "adam"
ADAMW_OPTIMIZER = "adamw"
LAMB_OPTIMIZER = "lamb"
LION_OPTIMIZER = "lion"
MUON_OPTIMIZER = "muon"
DEEPSPEED_OPTIMIZERS = [
    ADAGRAD_OPTIMIZER, ADAM_OPTIMIZER, ADAMW_OPTIMIZER, LAMB_OPTIMIZER, LION_OPTIMIZER, MUON_OPTIMIZER,
]  # fmt: skip
"""Values of the config key `optimizer.type`, in any case, for which there is a class of xtrain's own or a choice."""
TORCH_ADAM_PARAM = "torch_adam"
ADAM_W_MODE = "adam_w_mode"
"""Keys of `optimizer.params`."""
ADAM_W_MODE_DEFAULT = True
MUADAM_OPTIMIZER, MUADAMW_OPTIMIZER, MUSGD_OPTIMIZER = "muadam", "muadamw", "musgd"
"""Of the package mup, which a script brings; the config's `optimizer.type` does not take them."""


class DtypeEnum(enum.Enum):
    """Dtypes by the names that configs have for them; `DtypeEnum("bf16")` is `DtypeEnum.bf16`."""

    fp16 = torch.float16
    fp32 = torch.float32
    bf16 = torch.bfloat16
    int8 = torch.int8

    @classmethod
    def _missing_(cls, value: object) -> DtypeEnum | None:
        names = {
            "half": "fp16",
            "float16": "fp16",
            "float": "fp32",
            "float32": "fp32",
            "bfloat16": "bf16",
            "int": "int8",
        }
        text = str(value).removeprefix("torch.")
        return cls.__members__.get(names.get(text, text))


_COPIED = (
    "managed_gradient_accumulation", "steps_per_print", "dump_state", "disable_python_gc", "disable_allgather",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "gradient_clipping",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "wall_clock_breakdown", "memory_breakdown",
    "dataloader_drop_last", "log_level",
)  # fmt: skip


def get_gradient_clipping(param_dict: Mapping[str, Any]) -> float:
    """`gradient_clipping` of a config that is a dictionary, or the default."""
    return float(param_dict.get("gradient_clipping", Config.model_fields["gradient_clipping"].default))


def get_log_level(param_dict: Mapping[str, Any]) -> str | None:
    """`log_level` of a config that is a dictionary; None: it does not say."""
    return param_dict.get("log_level")


def get_train_batch_size(param_dict: Mapping[str, Any]) -> int | None:
    """`train_batch_size` of a config that is a dictionary; None: it does not say."""
    return param_dict.get("train_batch_size")


def get_train_micro_batch_size_per_gpu(param_dict: Mapping[str, Any]) -> int | None:
    """`train_micro_batch_size_per_gpu` of a config that is a dictionary; None: it does not say."""
    return param_dict.get("train_micro_batch_size_per_gpu")


def get_gradient_accumulation_steps(param_dict: Mapping[str, Any]) -> int | None:
    """`gradient_accumulation_steps` of a config that is a dictionary; None: it does not say."""
    return param_dict.get("gradient_accumulation_steps")


class CommsConfig:
    """`comms_logger`: the section; `comms_logger_enabled`: whether it is enabled."""

    def __init__(self, values: Config) -> None:
        self.comms_logger = values.comms_logger
        self.comms_logger_enabled = values.comms_logger.enabled

    def __repr__(self) -> str:
        return repr(self.comms_logger)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[name]


class DeepSpeedConfig:
    """A DeepSpeed config, checked, with the batch sizes solved for the number of data-parallel ranks.

    Args:
        config: a path, a dictionary, or JSON packed as URL-safe base64.
        mpu: answers `get_data_parallel_world_size()`; None: every rank is data parallel.
        mesh_device: not there yet.

    Attributes are DeepSpeed's: `train_batch_size`, `train_micro_batch_size_per_gpu`,
    `gradient_accumulation_steps`, `zero_enabled`, `zero_optimization_stage`, `zero_config` (with `stage` and the
    other keys of the section), `fp16_enabled`, `bfloat16_enabled`, `loss_scale`, `gradient_clipping`,
    `optimizer_name`, `optimizer_params`, `scheduler_name`, `scheduler_params`, `monitor_config`, `timers_config`,
    `flops_profiler_config`, `comms_config`, and the keys of the top level.

    Raises:
        ConfigError: a mistake in the config, in one sentence.
        NotImplementedYetError: the config asks for a feature that xtrain does not have yet, or `mesh_device`
            is given.
    """

    gradient_clipping: float

    def __init__(
        self, config: str | Path | Mapping[str, Any], mpu: Any = None, mesh_device: Any = None
    ) -> None:
        if mesh_device is not None:
            raise NotImplementedYetError("DeepSpeedConfig(mesh_device=...)", "leave it out, or pass an mpu")
        checked = load_config(config)
        values = checked.values
        self._param_dict = checked.raw
        self._public = checked.public()
        self.global_rank = comm.get_rank()
        self.world_size: int = comm.get_world_size() if mpu is None else mpu.get_data_parallel_world_size()
        self.train_batch_size: int | None = values.train_batch_size
        self.train_micro_batch_size_per_gpu: int | None = values.train_micro_batch_size_per_gpu
        self.gradient_accumulation_steps: int | None = values.gradient_accumulation_steps
        self._configure_train_batch_size()
        for name in _COPIED:
            setattr(self, name, getattr(values, name))

        self.zero_config = values.zero_optimization
        self.zero_optimization_stage = values.zero_optimization.stage
        self.zero_enabled = self.zero_optimization_stage > 0
        self.activation_checkpointing_config = values.activation_checkpointing
        self.checkpoint_config = values.checkpoint
        self.monitor_config = DeepSpeedMonitorConfig(values)
        self.timers_config = values.timers.throughput
        self.flops_profiler_config = values.flops_profiler
        self.comms_config = CommsConfig(values)

        self.float16_config, self.bfloat16_config = values.fp16, values.bf16
        self.fp16_enabled, self.bfloat16_enabled = values.fp16.enabled, values.bf16.enabled
        self.loss_scale = values.fp16.loss_scale
        self.initial_dynamic_scale = 2.0**values.fp16.initial_scale_power
        self.torch_autocast_enabled = values.torch_autocast.enabled
        self.torch_autocast_dtype = (
            DTYPES[values.torch_autocast.dtype] if "torch_autocast" in values.model_fields_set else None
        )
        self.torch_autocast_lower_precision_safe_modules = values.torch_autocast.lower_precision_safe_modules
        self.communication_data_type = _dtype(values.communication_data_type)
        self.seq_parallel_communication_data_type = DTYPES[
            values.seq_parallel_communication_data_type or "fp32"
        ]
        self.grad_accum_dtype = values.data_types.grad_accum_dtype
        self.param_dtype = values.data_types.param_dtype
        self.buffer_dtype = values.data_types.buffer_dtype

        optimizer, scheduler = values.optimizer, values.scheduler
        self.optimizer_name = None if optimizer is None else optimizer.reported_type
        self.optimizer_params = None if optimizer is None else optimizer.params
        self.optimizer_legacy_fusion = optimizer is not None and optimizer.legacy_fusion
        self.scheduler_name = None if scheduler is None else scheduler.type
        self.scheduler_params = None if scheduler is None else scheduler.params

        self.checkpoint_tag_validation_enabled = values.checkpoint.tag_validation != "Ignore"
        self.checkpoint_tag_validation_fail = values.checkpoint.tag_validation == "Fail"
        self.load_universal_checkpoint = values.checkpoint.load_universal
        self.use_node_local_storage = values.checkpoint.use_node_local_storage

    def _configure_train_batch_size(self) -> None:
        """Fill in which of the three sizes is None, and check them; DeepSpeed's private name, which tools call."""
        sizes = solve_batch_sizes(
            self.train_batch_size,
            self.train_micro_batch_size_per_gpu,
            self.gradient_accumulation_steps,
            self.world_size,
        )
        self.train_batch_size, self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps = sizes

    def print_user_config(self) -> None:
        """Log the config as it was given."""
        logger.info("config: %s", json.dumps(self._public, indent=2, sort_keys=True, default=str))

    def print(self, name: str) -> None:
        """Log every attribute under a heading."""
        logger.info("%s:", name)
        for key, value in sorted(vars(self).items()):
            if not key.startswith("_"):
                logger.info("  %s = %s", key, value)
        self.print_user_config()
