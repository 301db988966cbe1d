"""From a checked configuration to what will run: a run folder, a DeepSpeed config and a command.

Everything that can be wrong is found here, before a rank is started.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from omegaconf import DictConfig, OmegaConf

from xtrain.base.errors import ConfigError, DataError
from xtrain.base.files import write_text
from xtrain.base.run_folder import CHECKPOINTS, CONFIG, LOCK, LOGS, METRICS, OVERRIDES, RUN_DIR_VARIABLE
from xtrain.checkpoint.contents import is_checkpoint
from xtrain.config import load_config, solve_batch_sizes
from xtrain.config.batch import BatchSizes
from xtrain.data.corpus import find_files
from xtrain.launch.builtin import builtin_script
from xtrain.launch.checkpoints import AUTO, Source, find_source
from xtrain.launch.find_nodes import find_nodes
from xtrain.launch.memory import model_states
from xtrain.launch.nodes import Node
from xtrain.launch.processes import safe_path_flag
from xtrain.launch.schema import ClusterSection, LaunchConfig
from xtrain.launch.script_options import OPTIONS, PASS_LOCAL_RANK, config_options
from xtrain.launch.trust import check_overrides, sign
from xtrain.shims.process import MODE_VARIABLE


@dataclass(frozen=True)
class Job:
    """One run: what to start where, where it writes, and what the launcher needs to know of it.

    Attributes:
        source: checkpoint that the first start continues from.
        batch: sizes of the batches, on all ranks.
        continues: the run may be started again, because its script continues by itself.
        gets_config: the script is given the config; one that is not has its own, which nobody here knows.
        pass_local_rank: each rank's script gets --local_rank.
        needs: bytes of one rank's model states, for the check of memory; None when the script brings its own model.
    """

    run_dir: Path
    script: Path
    script_args: list[str]
    nodes: list[Node]
    cluster: ClusterSection
    env: dict[str, str]
    deepspeed_config: dict[str, Any]
    total_steps: int | None
    model: str
    builtin: bool
    source: Source | None
    continues: bool
    batch: BatchSizes
    keep: int | None
    backend: str | None
    needs: int | None
    gets_config: bool
    pass_local_rank: bool

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return sum(node.slots for node in self.nodes)

    @property
    def max_restarts(self) -> int:
        """Starts after a failure that bring no new checkpoint."""
        said = self.cluster.max_restarts
        return said if said is not None else 3 if self.builtin or self.continues else 0

    @property
    def min_nodes(self) -> int:
        """Fewer nodes are not enough."""
        if self.cluster.min_nodes is not None:
            return min(self.cluster.min_nodes, len(self.nodes))
        return 1

    def rank_command(self, source: Source | None) -> list[str]:
        """What every rank runs, after the interpreter."""
        load = []
        if self.builtin and source is not None:
            load = ["--load", str(source.folder), *(["--load-tag", source.tag] if source.tag else [])]
        rank = [
            *safe_path_flag(),
            "-m",
            "xtrain.launch.rank",
            *([PASS_LOCAL_RANK] if self.pass_local_rank else []),
        ]
        return [*rank, str(self.script), *load, *self.script_args]

    def config_for(self, ranks: int) -> str:
        """ds_config.json for so many ranks: the same global batch, by accumulation."""
        config = self.deepspeed_config
        if ranks != self.ranks:
            split = self.cluster.model_parallel_size
            config = {
                **config,
                "train_batch_size": self.batch.train,
                "train_micro_batch_size_per_gpu": self.batch.micro,
                "gradient_accumulation_steps": self.batch.train * split // (self.batch.micro * ranks),
            }
        return json.dumps(config, indent=2) + "\n"

    def ranks_with(self, available: int) -> int:
        """The largest number of ranks that can make the same steps, at most `available`; 0 when there is none.

        In aligned mode it is a power of two where the whole job's is, because then the bits stay the same.
        """
        if not self.gets_config:  # its batches are not known
            return self.ranks if available >= self.ranks else 0
        aligned = self.deepspeed_config.get("xtrain", {}).get("aligned") and not self.ranks & (self.ranks - 1)
        split = self.cluster.model_parallel_size
        slots = self.batch.train // self.batch.micro
        for ranks in range(min(available, self.ranks), 0, -1):
            if ranks % split == 0 and slots % (ranks // split) == 0 and not (aligned and ranks & (ranks - 1)):
                return ranks
        return 0


def _builtin_flags(config: LaunchConfig, run_dir: Path) -> list[str]:
    model = config.model.model_dump(exclude={"name"})
    train = {key: getattr(config.train, key) for key in ("steps", "seq_length", "seed", "weight_decay")}
    interval = config.train.save_interval
    train |= {"log_interval": config.train.log_interval}
    train |= {"save_interval": config.cluster.save_interval if interval is None else interval}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**model, **train}.items()]
    if config.data.paths:
        find_files(config.data.paths)
        flags += ["--data-path", *(str(Path(path).expanduser().absolute()) for path in config.data.paths)]
    return [*flags, "--save", str(run_dir / CHECKPOINTS)]


def _deepspeed_config(config: LaunchConfig, ranks: int) -> tuple[dict[str, Any], BatchSizes]:
    """The DeepSpeed config, and the sizes of its batches on so many ranks."""
    path = Path(config.deepspeed_config).expanduser() if config.deepspeed_config else None
    checked = load_config(path or config.deepspeed)
    values = checked.values
    given = values.train_batch_size, values.train_micro_batch_size_per_gpu, values.gradient_accumulation_steps
    split = config.cluster.model_parallel_size
    if ranks % split:
        raise ConfigError(f"{ranks} ranks cannot be divided by cluster.model_parallel_size={split}")
    return checked.raw, solve_batch_sizes(*given, ranks // split)


def _check_is_free(config: LaunchConfig, run_dir: Path, source: Source | None) -> None:
    """Refuse a folder that holds another run."""
    own = config.resume == AUTO or (source is not None and source.folder.parent == run_dir)
    if (run_dir / METRICS).exists() and not own:
        continuing = is_checkpoint(run_dir / CHECKPOINTS)
        hint = f", or add resume={config.run_dir} to continue it" if continuing else ""
        raise ConfigError(f"run_dir={config.run_dir} holds a run already: choose another folder{hint}")


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


_SCRIPT_KEYS = ("shims", "pass_config", "pass_local_rank")
"""Settings that are about a script of the user's."""


def options_for_config(config: LaunchConfig) -> list[str]:
    """The options by which the script is given the DeepSpeed config; none for a script that brings its own."""
    if config.script is None:
        return list(OPTIONS)
    known = config_options(Path(config.script).expanduser()) if config.pass_config else []
    return known or (list(OPTIONS) if config.pass_config is True else [])


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
        if concerns(key, (*_DEEPSPEED_KEYS, "deepspeed_config")) and not options_for_config(config):
            raise ConfigError(
                f"{key} would not be used: {config.script} is not given the config (pass_config={config.pass_config}); "
                "say pass_config=true if it takes --deepspeed_config, or leave the setting out"
            )
        if config.script is None and key in _SCRIPT_KEYS:
            raise ConfigError(f"{key} is for a script of your own: add script=FILE, or leave it out")
        if config.deepspeed_config is not None and concerns(key, _DEEPSPEED_KEYS) and not used_anyway:
            raise ConfigError(
                f"{key} would not be used: deepspeed_config={config.deepspeed_config} takes its place"
            )


def _script(config: LaunchConfig, run_dir: Path) -> tuple[Path, list[str]]:
    """The script and the flags that the settings make."""
    if config.script is None:
        return builtin_script(), _builtin_flags(config, run_dir)
    script = Path(config.script).expanduser().absolute()
    if not script.is_file():
        raise ConfigError(f"script={config.script} does not exist")
    if config.data.path is not None or config.resume not in (None, AUTO):
        key = "data.path" if config.data.path is not None else "resume"
        raise ConfigError(
            f"{key} is for the built-in script: pass your script its own arguments after `--`"
            + (", or say resume=auto if it continues by itself" if key == "resume" else "")
        )
    return script, []


def make_job(config: LaunchConfig, extra_args: list[str]) -> Job:
    """Check everything that can be checked here and return the job; writes nothing.

    Raises:
        ConfigError, DataError, CheckpointError, NotImplementedYetError: what is wrong, in one sentence.
    """
    if config.resume is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        # Queued again: what the batch script was told to continue from is older than what the run has saved.
        config = config.model_copy(update={"resume": AUTO})
    nodes = find_nodes(config.cluster)
    ranks = sum(node.slots for node in nodes)
    deepspeed_config, batch = _deepspeed_config(config, ranks)
    run_dir = Path(config.run_dir).expanduser().resolve()
    source = find_source(config.resume, run_dir)
    _check_is_free(config, run_dir, source)
    script, flags = _script(config, run_dir)
    given = [str(arg) for arg in config.script_args] + extra_args
    env = {**config.cluster.env, RUN_DIR_VARIABLE: str(run_dir)}
    if config.shims is not None:
        env[MODE_VARIABLE] = config.shims
    options = options_for_config(config)
    for option in options:
        flags += [option, str(run_dir / "ds_config.json")] if option == "--deepspeed_config" else [option]
    backend = deepspeed_config.get("xtrain", {}).get("backend")
    if backend:
        # For a script's own init_distributed(), which sees no config.
        env.setdefault("XTRAIN_BACKEND", backend)
    return Job(
        run_dir=run_dir,
        script=script,
        script_args=[*flags, *given],
        nodes=nodes,
        cluster=config.cluster,
        env=env,
        deepspeed_config=deepspeed_config,
        total_steps=config.train.steps if config.script is None else None,
        model=config.model.name if config.script is None else script.name,
        builtin=config.script is None,
        source=source,
        continues=config.resume == AUTO,
        batch=batch,
        keep=config.keep,
        gets_config=bool(options),
        pass_local_rank=config.pass_local_rank,
        backend=backend or config.cluster.backend,
        needs=model_states(config, deepspeed_config, ranks) if config.script is None else None,
    )


def saved_overrides(resume: str | None, run_dir: str, given: list[str], trusted: bool) -> list[str]:
    """What the command line of a run said that is now resumed; its folder and its own resume excepted.

    Raises:
        ConfigError: the folder is somebody else's, and says what to run.
    """
    if resume is None:
        return []
    path = Path(run_dir if resume == AUTO else resume).expanduser() / OVERRIDES
    if not path.is_file():
        return []
    saved = [item for item in json.loads(path.read_text()) if not item.startswith(("run_dir=", "resume="))]
    check_overrides(path, saved, given, trusted)
    return saved


def write_run_folder(job: Job, tree: DictConfig, overrides: list[str]) -> TextIO:
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
        write_text(job.run_dir / CONFIG, OmegaConf.to_yaml(tree))
        write_text(job.run_dir / "ds_config.json", job.config_for(job.ranks))
        write_text(job.run_dir / OVERRIDES, json.dumps(overrides))
        sign(job.run_dir, [CONFIG, OVERRIDES])
    except OSError as error:
        raise DataError(f"run folder {job.run_dir} cannot be written: {error}") from None
    return lock
