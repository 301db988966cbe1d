"""`xtrain launch --multirun`: Hydra's sweeper and launcher plug-ins run the launches; a table of them at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from xtrain.base.errors import ConfigError, XtrainError
from xtrain.base.run_folder import METRICS
from xtrain.launch.carry_out import carry_out
from xtrain.launch.compose import CONF, check_tree, explain_error, register_resolvers
from xtrain.launch.job import check_overrides_are_used, make_job
from xtrain.launch.supervisor import INTERRUPTED

_FOLDER = "runs/sweep_${now:%Y-%m-%d_%H-%M-%S}"


def run_sweep(overrides: Sequence[str], config_dir: str | None, script_args: list[str], debug: bool) -> int:
    """Run every combination of settings; 0 when all have ended well, else the first status that is not 0.

    Raises:
        ConfigError: the settings cannot be composed, or name a plug-in that is not installed.
    """
    given = [item for item in overrides if not item.startswith("run_dir=")]
    if len(given) < len(overrides):
        raise ConfigError(
            "run_dir= is for one run: with --multirun, hydra.sweep.dir=FOLDER says where the runs go"
        )
    if not any(item.startswith("hydra.sweep.dir=") for item in given):
        given.append(f"hydra.sweep.dir={_FOLDER}")
    if config_dir is not None:
        folder = Path(config_dir).resolve()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is not a folder")
        given.append(f"hydra.searchpath=[file://{folder}]")
    register_resolvers()
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("launch", create_config_search_path(str(CONF)))
    started = time.monotonic()
    try:
        returned = hydra.multirun(
            config_name="config",
            task_function=partial(run_one, script_args=script_args, debug=debug),
            overrides=[*given, "hydra.job.chdir=false", "hydra.output_subdir=null"],
            with_log_configuration=False,
        )
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain_error(error)) from None
    finally:
        GlobalHydra.instance().clear()
    return _show(_flatten(returned), time.monotonic() - started)


def run_one(tree: DictConfig, script_args: list[str], debug: bool) -> dict[str, Any]:
    """One run of a sweep: in this process, or where a launcher plug-in has brought it. What the table says of it."""
    register_resolvers()
    OmegaConf.resolve(tree)
    about = HydraConfig.get()
    tree.run_dir = str((Path(about.sweep.dir) / str(about.job.num)).resolve())
    started = time.monotonic()
    try:
        config = check_tree(OmegaConf.to_container(tree))
        overrides = list(about.overrides.task)
        check_overrides_are_used(config, overrides)
        job = make_job(config, script_args)
        tree.script_args = [*config.script_args, *script_args]
        status, told = carry_out(job, tree, overrides, script_args, Console(), debug, None)
    except XtrainError as error:
        if debug:
            raise
        status, told = error.exit_code, str(error)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    first = _last_step(Path(tree.run_dir) / METRICS)
    return {
        "status": status,
        "told": told,
        "run_dir": str(tree.run_dir),
        "step": first.get("step"),
        "loss": first.get("loss"),
        "seconds": time.monotonic() - started,
    }


def _last_step(path: Path) -> dict[str, Any]:
    last: dict[str, Any] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            last = entry if entry.get("type") == "step" else last
    return last


def _flatten(returned: Any) -> list[JobReturn]:
    """The sweeper returns its batches of runs, each a list."""
    return [job for batch in returned for job in (batch if isinstance(batch, list | tuple) else [batch])]


def _show(jobs: list[JobReturn], seconds: float) -> int:
    table = Table("run", "settings", "result", "step", "loss", "seconds")
    status = 0
    common = set.intersection(*(set(job.overrides or ()) for job in jobs)) if len(jobs) > 1 else set()
    for number, job in enumerate(jobs):
        about: dict[str, Any] = job.return_value  # raises what the run has raised
        status = status or about["status"]
        result = "done" if about["status"] == 0 else f"status {about['status']}"
        loss = "" if about["loss"] is None else f"{about['loss']:.4f}"
        settings = " ".join(item for item in job.overrides or () if item not in common)
        step = str(about["step"] or "")
        table.add_row(str(number), settings, about["told"] or result, step, loss, f"{about['seconds']:.0f}")
    console = Console()
    console.print(table)
    folder = Path(jobs[0].return_value["run_dir"]).parent if jobs else Path()
    console.print(
        f"{len(jobs)} runs in {seconds:.0f} s; everything is in {folder}", highlight=False, soft_wrap=True
    )
    return int(status)
