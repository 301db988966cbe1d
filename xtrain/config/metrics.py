"""Configuration sections of what observes training: monitors, timers, profiler, communication log.

Part of the schema (schema.py), kept apart because none of it changes what is computed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, SecretStr

from xtrain.config.rules import Section


class TensorBoardConfig(Section):
    """Event files for TensorBoard, written by rank 0 (docs/metrics.md). Needs the package tensorboard."""

    enabled: bool = False
    """Write them."""
    output_path: str = ""
    """Folder; "" is the working directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside `output_path`."""


class WandbConfig(Section):
    """Scalars to Weights & Biases from rank 0 (docs/metrics.md). Needs the package wandb."""

    enabled: bool = False
    """Send them."""
    group: str | None = None
    """Group of runs that this one belongs to."""
    team: str | None = None
    """Team or user (W&B's "entity") that owns the project. Left out: W&B's default for the account."""
    project: str = "deepspeed"
    """Project that the run is part of."""


class CsvConfig(Section):
    """One CSV file for each tag, written by rank 0 (docs/metrics.md)."""

    enabled: bool = False
    """Write them."""
    output_path: str = ""
    """Folder; "" is the working directory."""
    job_name: str = "DeepSpeedJobName"
    """Folder inside `output_path`."""


class CometConfig(Section):
    """Scalars to Comet from rank 0 (docs/metrics.md). Needs the package comet_ml, 3.41.0 or newer. What is left
    out here is taken from Comet's own configuration."""

    enabled: bool = False
    """Send them."""
    samples_log_interval: int = Field(100, ge=0)
    """Training samples between two submitted values of a tag."""
    project: str | None = None
    """Project that the experiment is part of."""
    workspace: str | None = None
    """Workspace that the project is part of."""
    api_key: SecretStr | None = None
    """Comet's key for the account. Better set in the environment (COMET_API_KEY), because the config file keeps it."""
    experiment_name: str | None = None
    """Name that is shown for the experiment."""
    experiment_key: str | None = None
    """Identifier of an experiment, to go on with one that exists."""
    online: bool | None = None
    """True: send values while training. False: keep them in files to upload later."""
    mode: Literal["get", "create", "get_or_create"] | None = None
    """Go on with the experiment of experiment_key, make a new one, or whichever is possible."""


class ThroughputConfig(Section):
    """Samples per second, in the lines of steps_per_print and in engine.tput_timer."""

    enabled: bool = True
    """Measure them."""
    synchronized: bool = True
    """Wait for the device before reading the clock; done only if `timers` or steps_per_print is in the config."""


class TimersConfig(Section):
    """How speed is measured."""

    ignores_unknown: ClassVar[bool] = True
    throughput: ThroughputConfig = ThroughputConfig()


class FlopsProfilerConfig(Section):
    """Floating-point operations, parameters and latency of one forward pass, by module. The first forward pass of one
    step is profiled on rank 0."""

    ignores_unknown: ClassVar[bool] = True
    enabled: bool = False
    """Profile it."""
    recompute_fwd_factor: float = Field(0.0, ge=0)
    """Share of the forward pass that backward computes again because of activation checkpointing, 0 to 1. It counts in
    the operations of the whole step."""
    profile_step: int = Field(1, ge=0)
    """Optimizer steps that run before the profiled one."""
    module_depth: int = Field(-1, ge=-1)
    """Depth of the module tree down to which classes of modules are summed up; -1: all of it."""
    top_modules: int = Field(1, ge=0)
    """Classes of modules that are listed at each depth, the largest first."""
    detailed: bool = True
    """Print the profile of every module."""
    output_file: str | None = None
    """File to write to. Left out: standard output."""


class CommsLoggerConfig(Section):
    """Latency and bandwidth of communication, summed up by comm.log_summary(). The count of bytes needs no key.
    (DeepSpeed logs whenever the section is there, whatever `enabled` says.)"""

    enabled: bool = False
    """Time operations."""
    verbose: bool = False
    """Log every timed operation when it ends."""
    prof_all: bool = True
    """True: time every operation. False: only those in prof_ops."""
    prof_ops: list[str] = []
    """Operations to time with prof_all false: names of functions of comm, or the `log_name` of a call."""
    debug: bool = False
    """Count operations apart by the function that called them."""
