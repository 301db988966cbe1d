"""Runs of a configuration that are kept: reading what can be run, running it, and finding it again.

Which configurations to run, and what their curves say, is decided in xtrain.align.bisect.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from xtrain.align.changes import Key, Tree, follows
from xtrain.align.command import RUN, last_lines, run_command
from xtrain.align.record import Record, read_record
from xtrain.base.errors import ConfigError, RecordError, XtrainError
from xtrain.base.files import write_text
from xtrain.base.run_folder import CHECKPOINTS, METRICS, RUN_DIR_VARIABLE
from xtrain.config.load import load_config, read_json
from xtrain.launch.compose import CONF, check_tree, compose_config
from xtrain.launch.job import make_job, write_run_folder
from xtrain.launch.supervisor import INTERRUPTED, Supervisor
from xtrain.launch.trust import check_configuration
from xtrain.version import __version__

CONFIG = "{config}"
"""In a command: the DeepSpeed config of the trial."""
_OUTCOME = "outcome.json"
_LOG = "trial.log"


class Runner(Protocol):
    """Carries out runs of one kind of configuration."""

    identity: list[str]
    """Distinguishes trials whose configuration is the same."""
    sources: dict[Key, Key]
    """Which keys follow from which others (see make_settings)."""

    def run(self, tree: Tree, folder: Path, log: Path) -> int:
        """Run into an empty folder; returns the exit status.

        Raises:
            XtrainError: this configuration cannot be run.
        """


class Launches:
    """`xtrain launch` of complete launch configurations.

    Args:
        templated: whether their DeepSpeed configs come from the launcher's template, and not from files.
    """

    def __init__(self, templated: bool) -> None:
        self.identity = ["xtrain launch", __version__]
        template: Any = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml"), resolve=False)
        self.sources = follows(template) if templated else {}

    def run(self, tree: Tree, folder: Path, log: Path) -> int:
        """As `xtrain launch` does; the checkpoint is not kept."""
        tree = {**tree, "run_dir": str(folder)}
        job = make_job(check_tree(tree), [])
        # That it fails is what the search wants to know.
        job = replace(job, cluster=job.cluster.model_copy(update={"max_restarts": 0}))
        with log.open("w", encoding="utf-8") as output:
            console = Console(file=output, width=200)
            with write_run_folder(job, OmegaConf.create(tree), []):
                status = Supervisor(job, console, debug=False).run()
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        return status


class Commands:
    """A command that is given the path of a DeepSpeed config."""

    def __init__(self, command: list[str]) -> None:
        self.identity = command
        self.sources: dict[Key, Key] = {}

    def run(self, tree: Tree, folder: Path, log: Path) -> int:
        """Write the config, and run the command."""
        config = folder / "config.json"
        write_text(config, json.dumps(tree, indent=2) + "\n")
        return run_command(self.identity, folder, log, {CONFIG: str(config)}, {})


@dataclass(frozen=True)
class Configuration:
    """What a user named.

    Attributes:
        record: of the run that the settings are from, where it is whole.
        templated: whether its DeepSpeed config comes from the launcher's template.
    """

    path: Path
    tree: Tree
    record: Record | None = None
    templated: bool = False


def _without_record_path(deepspeed: Tree) -> Tree:
    """Every trial writes its own record."""
    section = deepspeed.get("xtrain")
    if not isinstance(section, dict) or "record" not in section:
        return deepspeed
    record, section = section["record"], {key: value for key, value in section.items() if key != "record"}
    if isinstance(record, dict) and (more := {key: value for key, value in record.items() if key != "path"}):
        section["record"] = more
    return (
        {**deepspeed, "xtrain": section} if section else {k: v for k, v in deepspeed.items() if k != "xtrain"}
    )


def _read_launch(path: Path, trusted: bool) -> Configuration:
    """A run folder, or a config.yaml.

    Raises:
        ConfigError, RecordError: it is none, cannot be run again, or holds a record that is damaged.
    """
    file = path / "config.yaml" if path.is_dir() else path
    try:
        loaded: Any = OmegaConf.load(file)
        if OmegaConf.is_dict(loaded):
            loaded["run_dir"] = str(path)  # each trial has its own; a template's may need Hydra to be read
        tree: Any = OmegaConf.to_container(loaded, resolve=True)
    except FileNotFoundError:
        raise ConfigError(
            f"{file} does not exist: pass run folders of xtrain launch, or their config.yaml"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict) or "defaults" in tree:
        raise ConfigError(f"{file} is no complete launch configuration: pass the config.yaml of a run folder")
    try:
        config = check_tree(tree)
        if path.is_dir():
            usual: Any = OmegaConf.to_container(compose_config(["run_dir=none"])[1])
            check_configuration(file, tree, usual, trusted)
        if config.resume is not None and Path(config.resume).resolve() == file.parent.resolve():
            raise ConfigError(
                "this run was continued in its own folder, and the checkpoint it started from is not there any more"
            )
        if config.deepspeed_config is not None:
            kept = path / "ds_config.json"
            given = kept if path.is_dir() else Path(config.deepspeed_config).expanduser()
            tree |= {"deepspeed": load_config(given).raw, "deepspeed_config": None}
    except XtrainError as error:
        raise ConfigError(f"{file}: {error}") from None
    tree["deepspeed"] = _without_record_path(tree["deepspeed"])
    del tree["run_dir"]
    record = None
    if path.is_dir() and (path / METRICS).exists():
        record = read_record(path)
        finished = config.script is None and len(record.step) and record.step[-1] >= config.train.steps
        if not finished or record.restarts():
            record = None
    return Configuration(path, tree, record, config.deepspeed_config is None)


def read_configurations(
    paths: list[str], command: list[str] | None, trusted: bool = False
) -> tuple[Configuration, Configuration, Runner]:
    """GOOD and BAD, and how they are run.

    Args:
        trusted: what run folders say may be run, whoever has written them.

    Raises:
        XtrainError: they cannot be read, are of two kinds, or the command does not fit.
    """
    if len(paths) != 2:
        raise RecordError(
            f"xtrain align --bisect takes two configurations, GOOD and BAD, and was given {len(paths)}"
        )
    good, bad = map(Path, paths)
    for path in (good, bad):
        if not path.exists():
            raise ConfigError(f"{path} does not exist: pass run folders of xtrain launch, or configurations")
    launched = [path.is_dir() or path.suffix in (".yaml", ".yml") for path in (good, bad)]
    if launched[0] != launched[1]:
        raise ConfigError(
            f"{good} and {bad} are of two kinds: pass two run folders (or their config.yaml), or two DeepSpeed configs"
        )
    if launched[0]:
        if command is not None:
            raise ConfigError(
                "run folders and config.yaml are run by xtrain launch: `-- COMMAND` is for DeepSpeed configs, "
                f"such as {good / 'ds_config.json' if good.is_dir() else 'ds_config.json'}"
            )
        first, second = _read_launch(good, trusted), _read_launch(bad, trusted)
        return first, second, Launches(first.templated and second.templated)
    if not command:
        raise ConfigError(
            f"how is {good} run? Add `-- COMMAND`, with {CONFIG} for the config of a trial and {RUN} for its folder"
        )
    if not any(CONFIG in word for word in command):
        raise ConfigError(f"COMMAND has no {CONFIG} in it, which stands for the DeepSpeed config of a trial")
    read = [Configuration(path, _without_record_path(read_json(path))) for path in (good, bad)]
    return read[0], read[1], Commands(command)


@dataclass(frozen=True)
class Trial:
    """One run.

    Attributes:
        record: None when there is none that can be read.
        failure: why it ended badly, or has no record; empty otherwise.
        kept: whether it was found, and not run.
    """

    folder: Path
    record: Record | None
    failure: str
    seconds: float
    kept: bool = False


class Trials:
    """The runs of one folder; each configuration has its own folder in it, and is not run again when it ended well."""

    def __init__(self, folder: Path, runner: Runner) -> None:
        self.folder = folder.resolve()
        self.runner = runner

    def lock(self) -> TextIO:
        """Keeps other searches out of the folder, which would remove what this one is at; until it is closed.

        Raises:
            RecordError: the folder cannot be written, or is in use.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("w")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecordError(
                f"{self.folder} is in use by another search: choose another folder with -o"
            ) from None
        except OSError as error:
            raise RecordError(f"{self.folder} cannot be written: {error.strerror}") from None
        return file

    def run(self, tree: Tree, about: list[str], again: bool = False) -> Trial:
        """Run a configuration, or find the run.

        Args:
            about: what it is, for who looks into the folder.
            again: a second run of the same.
        """
        text = json.dumps([self.runner.identity, tree, again], sort_keys=True)
        folder = self.folder / hashlib.sha256(text.encode()).hexdigest()[:10]
        outcome = folder / _OUTCOME
        if outcome.exists():
            found = json.loads(outcome.read_text(encoding="utf-8"))
            if not found["failure"]:
                return self._trial(folder, "", found["seconds"], kept=True)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        started, log = time.monotonic(), folder / _LOG
        try:
            status = self.runner.run(tree, folder, log)
            failure = f"it ended with status {status} ({log}): {last_lines(log)}" if status else ""
        except RecordError:
            raise  # the command is not there, whatever the configuration
        except XtrainError as error:
            failure = str(error)
        seconds = time.monotonic() - started
        trial = self._trial(folder, failure, seconds)
        told = {"settings": about, "failure": trial.failure, "seconds": round(seconds, 1)}
        write_text(outcome, json.dumps(told, indent=2) + "\n")
        return trial

    def _trial(self, folder: Path, failure: str, seconds: float, kept: bool = False) -> Trial:
        file, record = folder / METRICS, None
        if file.exists():
            try:
                record = read_record(file)
            except RecordError as error:
                failure = failure or str(error)
        elif not failure:
            failure = (
                f"it wrote no record to {file}: pass {RUN} as its run folder, or record to the folder in "
                f"{RUN_DIR_VARIABLE}"
            )
        return Trial(folder, record, failure, seconds, kept)
