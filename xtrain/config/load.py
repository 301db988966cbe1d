"""From a path or a dictionary to a checked `Config`; every mistake becomes one sentence."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from xtrain.config.combine import check_combinations
from xtrain.config.rules import Section, apply_rules, apply_rules_of_deepspeed, drop_auto
from xtrain.config.schema import Config
from xtrain.errors import ConfigError, NotImplementedYetError, nearest

_OLD_SPELLINGS = {"bfloat16": "bf16"}  # DeepSpeed still reads it


class XtrainConfig:
    """A checked configuration with where it came from.

    Attributes:
        values: the typed configuration.
        raw: the dictionary as the user wrote it.
        source: file name, or "config" when it was passed as a dictionary.
        notices: sentences about keys that were accepted without effect.
    """

    def __init__(self, values: Config, raw: dict[str, Any], source: str, notices: list[str]) -> None:
        self.values = values
        self.raw = raw
        self.source = source
        self.notices = notices

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


def _section_model(path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model that describes the section at `path`, or None below a free-form dictionary."""
    model: type[BaseModel] = Config
    for part in path:
        for name, info in model.model_fields.items():
            if part in (name, info.alias):
                candidates = [info.annotation, *get_args(info.annotation)]
                sections = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
                if not sections:
                    return None
                model = sections[0]
                break
        else:
            return None
    return model


def _keys(model: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in model.model_fields.items()]


def _key_elsewhere(key: str) -> str | None:
    """Dotted name of a section key called `key`, for keys written at the wrong level."""
    if key in _keys(Config):
        return key
    for name in _keys(Config):
        model = _section_model((name,))
        if model is not None and key in _keys(model):
            return f"{name}.{key}"
    return None


def _describe(error: Any, source: str) -> str:
    path = tuple(part for part in error["loc"])
    dotted = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        model = _section_model(path[:-1])
        key = str(path[-1])
        close = nearest(key, _keys(model)) if model else None
        where = f" in section {'.'.join(map(str, path[:-1]))!r}" if len(path) > 1 else ""
        elsewhere = _key_elsewhere(key)
        if close:
            hint = f"did you mean {close!r}?"
        elif elsewhere:
            hint = f"the key is {elsewhere!r}"
        else:
            hint = "remove it, or see docs/config.md for the keys there are"
        return f"{source}: unknown key {key!r}{where}: {hint}"
    if error["type"] == "missing":
        return f"{source}: the key {dotted!r} is missing"
    return f"{source}: {dotted!r} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def load_config(config: str | Path | Mapping[str, Any]) -> XtrainConfig:
    """Read and check a DeepSpeed configuration: a path, a mapping, or JSON packed as URL-safe base64.

    Raises:
        ConfigError: unreadable file, unknown key (the nearest valid one is named) or wrong value.
        NotImplementedYetError: the configuration asks for a feature that xtrain does not have yet.
    """
    raw, source = _read(config)
    renamed = {_OLD_SPELLINGS.get(key, key): value for key, value in raw.items()}
    try:
        values = Config.model_validate(drop_auto(renamed))
    except ValidationError as error:
        raise ConfigError(_describe(error.errors()[0], source)) from None
    try:
        notices: list[str] = []
        if values.xtrain.engine == "deepspeed":
            apply_rules_of_deepspeed(values)
        else:
            notices = apply_rules(values, values.zero_optimization.stage)
            check_combinations(values)
    except (NotImplementedYetError, ConfigError) as error:
        error.args = (f"{source}: {error.args[0]}",)
        raise
    return XtrainConfig(values, raw, source, notices)
