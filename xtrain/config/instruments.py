"""Configuration sections of what observes training: monitors, timers, profiler, communication log.

Part of the schema (schema.py), kept apart because none of it changes what is computed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SecretStr

from xtrain.config.rules import Section


class TensorBoardConfig(Section):
    """`tensorboard`: event files for TensorBoard, written by rank 0. Needs the package tensorboard."""

    enabled: bool = False
    output_path: str = ""
    """Folder; "" is the working directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside `output_path`."""


class WandbConfig(Section):
    """`wandb`: scalars to Weights & Biases from rank 0. Needs the package wandb."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str = "deepspeed"


class CsvConfig(Section):
    """`csv_monitor`: one CSV file for each tag, written by rank 0."""

    enabled: bool = False
    output_path: str = ""
    """Folder; "" is the working directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside `output_path`."""


class CometConfig(Section):
    """`comet`: scalars to Comet from rank 0. Needs the package comet_ml, 3.41.0 or newer. What is left out here
    is taken from Comet's own configuration."""

    enabled: bool = False
    samples_log_interval: int = Field(100, ge=0)
    """Samples between two submitted values of a tag."""
    project: str | None = None
    workspace: str | None = None
    api_key: SecretStr | None = None
    """Better left out and set in the environment: the config file keeps it."""
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: Literal["get", "create", "get_or_create"] | None = None


class ThroughputConfig(Section):
    """`timers.throughput`: samples per second, in the lines of steps_per_print and in engine.tput_timer."""

    enabled: bool = True
    synchronized: bool = True
    """Wait for the device before reading the clock; done only if `timers` or steps_per_print is in the config."""


class TimersConfig(Section):
    """`timers`."""

    ignores_unknown: ClassVar[bool] = True
    throughput: ThroughputConfig = ThroughputConfig()


class FlopsProfilerConfig(Section):
    """`flops_profiler`: floating-point operations, parameters and latency of one forward pass, by module. The first
    forward pass of the step is profiled on rank 0."""

    ignores_unknown: ClassVar[bool] = True
    enabled: bool = False
    recompute_fwd_factor: float = Field(0.0, ge=0)
    """Part of the forward pass that backward computes again, for activation checkpointing."""
    profile_step: int = Field(1, ge=0)
    """Number of optimizer steps before the profiled one."""
    module_depth: int = Field(-1, ge=-1)
    """Depth down to which modules are summed up; -1: all."""
    top_modules: int = Field(1, ge=0)
    """Classes of modules listed at each depth."""
    detailed: bool = True
    """Print the profile of every module."""
    output_file: str | None = None
    """File to write to instead of standard output."""


class CommsLoggerConfig(Section):
    """`comms_logger`: latency and bandwidth of communication, summed up by comm.log_summary(). The count of bytes
    needs no key. (DeepSpeed logs whenever the section is there, whatever `enabled` says.)"""

    enabled: bool = False
    verbose: bool = False
    """Log every operation."""
    prof_all: bool = True
    """Time every operation; false: those in prof_ops."""
    prof_ops: list[str] = []
    """Names of operations: of functions of comm, or `log_name` of a call."""
    debug: bool = False
    """Log operations by the function that called them, too."""
