"""From a path or a dictionary to a checked `Config`; every mistake becomes one sentence."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.config.arguments import shown
from xtrain.config.combine import check_combinations
from xtrain.config.rules import Section, apply_rules, apply_rules_of_deepspeed, drop_auto
from xtrain.config.schema import Config
from xtrain.config.unknown import drop_unknown, refusal, section_model

_OLD_SPELLINGS = {"bfloat16": "bf16"}  # DeepSpeed still reads it


class XtrainConfig:
    """A checked configuration with where it came from.

    Attributes:
        values: the typed configuration.
        raw: the dictionary as the user wrote it.
        source: file name, or "config" when it was passed as a dictionary.
        notices: sentences about keys that were accepted without effect.
        warnings: sentences about keys that were ignored.
    """

    def __init__(
        self, values: Config, raw: dict[str, Any], source: str, notices: list[str], warnings: list[str]
    ) -> None:
        self.values = values
        self.raw = raw
        self.source = source
        self.notices = notices
        self.warnings = warnings

    def public(self) -> dict[str, Any]:
        """The dictionary as the user wrote it, without the keys that are secret: for records and messages."""
        comet = self.raw.get("comet")
        if not isinstance(comet, dict) or not comet.get("api_key"):
            return self.raw
        return {**self.raw, "comet": {**comet, "api_key": "**********"}}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"the key {key!r} stands twice: remove one")
        result[key] = value
    return result


def _loads(text: str, strict: bool) -> Any:
    """JSON; or, unless `strict`, Hjson, which DeepSpeed reads too, where its package is installed."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError:
        if strict or importlib.util.find_spec("hjson") is None:
            raise
        import hjson

        try:
            return hjson.loads(text, object_pairs_hook=_no_duplicates)
        except hjson.HjsonDecodeError:
            pass  # the error of JSON is the one to show
        raise


def _parse(text: str, source: str, strict: bool = False) -> dict[str, Any]:
    try:
        data = _loads(text, strict)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: it is nested too deep") from None
    except ValueError as error:  # an integer of more digits than Python reads
        raise ConfigError(f"{source} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must hold a JSON object, not {type(data).__name__}")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """A DeepSpeed config file as it stands, unchecked.

    Raises:
        ConfigError: it is missing, or no JSON (or Hjson) object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    return _parse(text, f"config file {path}")


def _from_base64(text: str) -> str | None:
    """The JSON object that a launcher has packed into an argument (URL-safe base64), or None if it is none."""
    try:
        decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
    except ValueError:  # not base64, or not text
        return None
    return decoded if decoded.lstrip().startswith("{") else None


def _read(config: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(the dictionary, where it came from)."""
    if isinstance(config, Mapping):
        return dict(config), "config"
    if isinstance(config, os.PathLike):
        config = Path(os.fspath(config))
    if not isinstance(config, str | Path):
        raise ConfigError(f"config must be a path or a dictionary, not {type(config).__name__}")
    packed = None if isinstance(config, Path) or os.path.exists(config) else _from_base64(config)
    if packed is not None:
        return _parse(packed, "base64 config", strict=True), "base64 config"
    return read_json(Path(config)), str(config)


def _describe(error: Any) -> str:
    path = tuple(str(part) for part in error["loc"])
    dotted = ".".join(path)
    if error["type"] == "extra_forbidden":
        return refusal(path[-1], path[:-1])
    if error["type"] == "missing":
        return f"the key {dotted!r} is missing"
    wrong = error["msg"].removeprefix("Value error, ")
    return f"{dotted!r} is {shown(error['input'])}: {wrong[0].lower()}{wrong[1:]}"


# Pydantic's names for values of the right type that are out of range.
_OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "literal_error")


def _switched_off(values: dict[str, Any], error: Any) -> tuple[dict[str, Any], str] | None:
    """(section, key) of a wrong value in a section that says `"enabled": false`; None: the value matters.

    As in DeepSpeed: of a section that it reads key by key nothing matters then; of the others types do.
    """
    section: Any = values
    for depth, part in enumerate(error["loc"]):
        if not isinstance(section, dict) or part not in section:
            return None
        if section.get("enabled") is False and part != "enabled":
            model = section_model(error["loc"][:depth])
            free = isinstance(model, type) and issubclass(model, Section) and model.ignores_unknown
            return (section, part) if free or error["type"] in _OUT_OF_RANGE else None
        section = section[part]
    return None


def _validate(values: dict[str, Any], notices: list[str]) -> Config:
    """The typed configuration. A wrong value in a section that is switched off is left out, with a notice."""
    while True:
        try:
            return Config.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
        off = _switched_off(values, first)
        if off is None:
            raise ConfigError(_describe(first))
        section, key = off
        del section[key]
        notices.append(f"config key {_describe(first)} (ignored: its section is not enabled)")


def _check(raw: dict[str, Any]) -> tuple[Config, list[str], list[str]]:
    """(the typed configuration, notices, warnings)."""
    renamed = {_OLD_SPELLINGS.get(key, key): value for key, value in raw.items()} | {
        key: raw[key] for key in _OLD_SPELLINGS.values() if key in raw
    }
    known, warnings = drop_unknown(drop_auto(renamed))
    notices: list[str] = []
    values = _validate(known, notices)
    if values.xtrain.engine == "deepspeed":
        apply_rules_of_deepspeed(values)
        return values, [], warnings
    notices += apply_rules(values, values.zero_optimization.stage)
    check_combinations(values)
    return values, notices, warnings


def load_config(config: str | Path | Mapping[str, Any]) -> XtrainConfig:
    """Read and check a DeepSpeed configuration: a path, a mapping, or JSON packed as URL-safe base64.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest valid one is named) or wrong value.
        NotImplementedYetError: the configuration asks for a feature that xtrain does not have yet.
    """
    raw, source = _read(config)
    try:
        values, notices, warnings = _check(raw)
    except (NotImplementedYetError, ConfigError) as error:
        error.args = (f"{source}: {error.args[0]}",)
        raise
    except RecursionError:
        raise ConfigError(f"{source}: it is nested too deep") from None
    return XtrainConfig(values, raw, source, notices, warnings)
