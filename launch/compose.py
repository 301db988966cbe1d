"""Composing the launch configuration with Hydra; every mistake becomes one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from xtrain.base.errors import ConfigError, nearest, unknown_name
from xtrain.launch.schema import LaunchConfig

CONF = Path(__file__).resolve().parent.parent / "conf"


def _conf_dir() -> Path:
    # In a checkout this file is launch/compose.py, in an installed package xtrain/launch/compose.py;
    # conf stands beside launch in both.
    if not (CONF / "config.yaml").is_file():
        raise ConfigError(f"the configuration folder {CONF} is missing: reinstall xtrain")
    return CONF


def groups(extra: Path | None = None) -> dict[str, list[str]]:
    """The config groups and their choices, those of the user's own folder included."""
    found: dict[str, set[str]] = {}
    for root in filter(None, (_conf_dir(), extra)):
        for path in root.glob("*/*.yaml"):
            found.setdefault(path.parent.name, set()).add(path.stem)
    return {name: sorted(choices) for name, choices in sorted(found.items())}


def _check_overrides(overrides: list[str], extra: Path | None) -> None:
    choices = groups(extra)
    for override in overrides:
        key, equals, value = override.partition("=")
        if key.lstrip("+~").startswith("hydra"):
            raise ConfigError(f"{override!r} is for sweeps: say --multirun")
        if not equals and not override.startswith("~"):
            raise ConfigError(f"{override!r} is not of the form key=value (script arguments go after `--`)")
        if key in choices and value not in choices[key]:
            raise ConfigError(unknown_name(key, value, choices[key]))


def _all_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, child in tree.items():
        keys.append(f"{prefix}{key}")
        if isinstance(child, dict):
            keys += _all_keys(child, f"{prefix}{key}.")
    return keys


def _explain(error: Exception, defaults: dict[str, Any]) -> str:
    first = str(error).split("\n")[0].strip()
    if match := re.match(r"Could not override '([^']+)'", first):
        key = match[1]
        if key in _all_keys(defaults):
            return f"{key!r} cannot be given entries that are not there yet in this way: write +{key}=..."
        close = nearest(key, _all_keys(defaults))
        hint = (
            f"did you mean {close!r}?" if close else "see conf/config.yaml; `+key=value` adds a DeepSpeed key"
        )
        return f"unknown key {key!r}: {hint}"
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: quote the value, as in 'key=\"value\"'"
    if match := re.search(r"Could not find 'hydra/(launcher|sweeper)/([^']+)'", first):
        return f"no installed package brings hydra/{match[1]}={match[2]}: install its plug-in"
    return f"the configuration cannot be composed: {first}"


def register_resolvers() -> None:
    """What ${equal:a,b} in the configuration means."""
    OmegaConf.register_new_resolver("equal", lambda a, b: a == b, replace=True)


def explain_error(error: Exception) -> str:
    """A sentence for what Hydra says, where the settings without overrides tell which keys there are."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(_conf_dir()), version_base="1.3"):
        defaults: Any = OmegaConf.to_container(compose("config"), resolve=False)
    return _explain(error, defaults)


def compose_config(overrides: list[str], config_dir: str | None = None) -> tuple[LaunchConfig, DictConfig]:
    """The checked configuration, and the resolved tree to be written into the run folder.

    Args:
        overrides: Hydra overrides, as on the command line.
        config_dir: a folder of the user's with more choices for the groups (cluster/mine.yaml, ...).

    Raises:
        ConfigError: unknown choice or key (the nearest is named), wrong value, unreadable file.
    """
    extra = Path(config_dir).resolve() if config_dir else None
    if extra is not None and not extra.is_dir():
        raise ConfigError(f"--config-dir {config_dir} is not a folder")
    _check_overrides(overrides, extra)
    register_resolvers()
    search = [f"hydra.searchpath=[file://{extra}]"] if extra else []
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(_conf_dir()), version_base="1.3"):
        try:
            tree = compose("config", overrides=[*search, *overrides])
            OmegaConf.resolve(tree)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            defaults: Any = OmegaConf.to_container(compose("config"), resolve=False)
            raise ConfigError(_explain(error, defaults)) from None
    return check_tree(OmegaConf.to_container(tree)), tree


def check_tree(tree: Any) -> LaunchConfig:
    """The typed configuration of a resolved tree.

    Raises:
        ConfigError: a key is unknown or missing, or its value is wrong.
    """
    try:
        return LaunchConfig.model_validate(tree)
    except ValidationError as error:
        problem = error.errors()[0]
        dotted = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "missing":
            raise ConfigError(f"the key {dotted!r} is missing") from None
        raise ConfigError(
            f"{dotted} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
        ) from None
