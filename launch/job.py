"""From a checked configuration to what will run: a run folder, a DeepSpeed config and a command.

Everything that can be wrong is found here, before a rank is started.
"""

from __future__ import annotations

import fcntl
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from xtrain.base.errors import CheckpointError, ConfigError, DataError, NotImplementedYetError
from xtrain.base.files import write_text
from xtrain.base.run_folder import (
    CHECKPOINTS,
    LOCK,
    LOGS,
    METRICS,
    OVERRIDES,
    RUN_DIR_VARIABLE,
    STOP,
    STOPPED,
)
from xtrain.checkpoint.contents import find_tag, is_checkpoint
from xtrain.config import load_config, solve_batch_sizes
from xtrain.data.corpus import find_files
from xtrain.launch.schema import LaunchConfig


def safe_path_flag() -> list[str]:
    """Keep `python -m` from putting the current folder first on the path, where a `random.py` would hide
    Python's own; Python 3.10 cannot."""
    return ["-P"] if sys.version_info >= (3, 11) else []


@dataclass(frozen=True)
class Job:
    """One run: what to start, where it writes, and what the progress display needs."""

    run_dir: Path
    script: Path
    script_args: list[str]
    ranks: int
    env: dict[str, str]
    stop_timeout: float
    total_steps: int | None
    model: str
    resumable: bool

    @property
    def agent_command(self) -> list[str]:
        """The process that starts and watches the ranks (torchrun's agent)."""
        agent = ["-m", "xtrain.launch.agent", str(self.run_dir), str(self.ranks)]
        return [sys.executable, *safe_path_flag(), *agent, *self.rank_command]

    @property
    def rank_command(self) -> list[str]:
        """What every rank runs."""
        return [*safe_path_flag(), "-m", "xtrain.launch.rank", str(self.script), *self.script_args]


def builtin_script() -> Path:
    """The GLM pretraining script: beside this package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (
        package / "examples" / "pretrain_glm.py",
        package.parent / "examples" / "pretrain_glm.py",
    ):
        if candidate.is_file():
            return candidate
    raise ConfigError("the built-in script pretrain_glm.py is missing: reinstall xtrain or pass script=")


def _builtin_flags(config: LaunchConfig, run_dir: Path, load: Path | None) -> list[str]:
    model = config.model.model_dump(exclude={"name"})
    train = {key: getattr(config.train, key) for key in ("steps", "seq_length", "seed", "weight_decay")}
    train |= {key: getattr(config.train, key) for key in ("log_interval", "save_interval")}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**model, **train}.items()]
    if config.data.paths:
        find_files(config.data.paths)
        flags += ["--data-path", *(str(Path(path).expanduser().absolute()) for path in config.data.paths)]
    flags += ["--save", str(run_dir / CHECKPOINTS)]
    return flags + (["--load", str(load)] if load else [])


def _deepspeed_config(config: LaunchConfig) -> dict[str, Any]:
    path = Path(config.deepspeed_config).expanduser() if config.deepspeed_config else None
    checked = load_config(path or config.deepspeed)
    values = checked.values
    solve_batch_sizes(
        values.train_batch_size,
        values.train_micro_batch_size_per_gpu,
        values.gradient_accumulation_steps,
        config.ranks,
    )
    return checked.raw


def _resume_from(resume: str | None) -> Path | None:
    if resume is None:
        return None
    given = Path(resume).expanduser()
    for folder in (given / CHECKPOINTS, given):
        if folder.is_dir() and is_checkpoint(folder):
            find_tag(folder, None)
            return folder.resolve()
    raise CheckpointError(f"resume={resume}: there is no complete checkpoint in this folder")


def _run_dir(config: LaunchConfig, resume: Path | None) -> Path:
    run_dir = Path(config.run_dir).expanduser().resolve()
    own = resume is not None and resume.parent == run_dir
    if (run_dir / METRICS).exists() and not own:
        continuing = is_checkpoint(run_dir / CHECKPOINTS)
        hint = f", or add resume={config.run_dir} to continue it" if continuing else ""
        raise ConfigError(f"run_dir={config.run_dir} holds a run already: choose another folder{hint}")
    return run_dir


_MODEL_FLAGS = (
    "model",
    "data",
    "train.seq_length",
    "train.seed",
    "train.log_interval",
    "train.save_interval",
)
"""Settings that reach the built-in script only, as its flags."""
_DEEPSPEED_KEYS = ("deepspeed", "parallel", "backend", "train")
"""Settings that reach the ranks through the DeepSpeed config that the launcher writes."""


def check_overrides_are_used(config: LaunchConfig, overrides: list[str]) -> None:
    """Refuse settings of the command line that this run would not look at.

    Raises:
        ConfigError: naming the first one, and why.
    """

    def concerns(key: str, prefixes: tuple[str, ...]) -> bool:
        return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)

    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        flag = concerns(key, _MODEL_FLAGS)
        if config.script is not None and flag:
            raise ConfigError(
                f"{key} is for the built-in script: pass your script its own arguments after `--`"
            )
        used_anyway = config.script is None and (flag or key in ("train.steps", "train.weight_decay"))
        if config.deepspeed_config is not None and concerns(key, _DEEPSPEED_KEYS) and not used_anyway:
            raise ConfigError(
                f"{key} would not be used: deepspeed_config={config.deepspeed_config} takes its place"
            )


def make_job(config: LaunchConfig, extra_args: list[str]) -> tuple[Job, dict[str, Any]]:
    """Check everything and return the job with its DeepSpeed config; writes nothing.

    Raises:
        ConfigError, DataError, CheckpointError, NotImplementedYetError: what is wrong, in one sentence.
    """
    if config.cluster.nodes > 1:
        raise NotImplementedYetError(f"cluster.nodes={config.cluster.nodes}", "launch on one node")
    deepspeed_config = _deepspeed_config(config)
    resume = _resume_from(config.resume)
    run_dir = _run_dir(config, resume)
    given = [str(arg) for arg in config.script_args] + extra_args
    if config.script is None:
        script, flags = builtin_script(), _builtin_flags(config, run_dir, resume)
        total_steps: int | None = config.train.steps
    else:
        script, flags, total_steps = Path(config.script).expanduser().absolute(), [], None
        if not script.is_file():
            raise ConfigError(f"script={config.script} does not exist")
        if config.data.path is not None or resume is not None:
            key = "data.path" if config.data.path is not None else "resume"
            raise ConfigError(
                f"{key} is for the built-in script: pass your script its own arguments after `--`"
            )
    env = {**config.cluster.env, RUN_DIR_VARIABLE: str(run_dir)}
    if backend := deepspeed_config.get("xtrain", {}).get("backend"):
        env.setdefault(
            "XTRAIN_BACKEND", backend
        )  # for a script's own init_distributed(), which sees no config
    job = Job(
        run_dir=run_dir,
        script=script,
        script_args=[*flags, "--deepspeed", "--deepspeed_config", str(run_dir / "ds_config.json"), *given],
        ranks=config.ranks,
        env=env,
        stop_timeout=config.cluster.stop_timeout,
        total_steps=total_steps,
        model=config.model.name if config.script is None else script.name,
        resumable=config.script is None,
    )
    return job, deepspeed_config


def saved_overrides(resume: str | None) -> list[str]:
    """What the command line of a run said that is now resumed; its folder and its own resume excepted."""
    path = Path(resume).expanduser() / OVERRIDES if resume else None
    if path is None or not path.is_file():
        return []
    return [item for item in json.loads(path.read_text()) if not item.startswith(("run_dir=", "resume="))]


def write_run_folder(
    job: Job, tree: DictConfig, deepspeed_config: dict[str, Any], overrides: list[str]
) -> TextIO:
    """Create the run folder with the resolved configuration.

    Returns:
        The lock on the folder; it holds until the file is closed.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        (job.run_dir / LOGS).mkdir(parents=True, exist_ok=True)
        lock = (job.run_dir / LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run_dir={job.run_dir} is in use by another launch: choose another folder"
            ) from None
        for name in (STOP, STOPPED):
            (job.run_dir / name).unlink(missing_ok=True)
        for old in (job.run_dir / LOGS).glob("*.json"):
            old.unlink()
        write_text(job.run_dir / "config.yaml", OmegaConf.to_yaml(tree))
        write_text(job.run_dir / "ds_config.json", json.dumps(deepspeed_config, indent=2) + "\n")
        write_text(job.run_dir / OVERRIDES, json.dumps(overrides))
    except OSError as error:
        raise DataError(f"run folder {job.run_dir} cannot be written: {error}") from None
    return lock
