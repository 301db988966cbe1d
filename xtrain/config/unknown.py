"""Keys that the schema does not have: a mistake near a real key, or something that nobody reads.

DeepSpeed ignores what it does not know at the top level and in the sections that it reads key by key, and
refuses it in the others. So do we; but a key that is near a real one is always an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from xtrain.base.errors import ConfigError, nearest
from xtrain.config.rules import Section
from xtrain.config.schema import Config


def _field(model: type[BaseModel], key: str) -> FieldInfo | None:
    return next((info for name, info in model.model_fields.items() if key in (name, info.alias)), None)


def _section_of(info: FieldInfo) -> type[Section] | None:
    """The model of a field that is a section."""
    for candidate in (info.annotation, *get_args(info.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def keys(model: type[BaseModel]) -> list[str]:
    """The keys of a section as users write them."""
    return [info.alias or name for name, info in model.model_fields.items()]


def _sections() -> dict[str, type[Section]]:
    found = {key: _section_of(info) for key in keys(Config) if (info := _field(Config, key)) is not None}
    return {key: model for key, model in found.items() if model is not None}


def section_model(path: tuple[Any, ...]) -> type[BaseModel] | None:
    """The model that describes the section at `path`, or None below a free-form dictionary."""
    model: type[BaseModel] | None = Config
    for part in path:
        info = _field(model, part) if model is not None and isinstance(part, str) else None
        model = _section_of(info) if info is not None else None
    return model


def _elsewhere(key: str) -> str | None:
    """Dotted name of the key that is meant, for keys at the wrong level: "stage", and "fp16_enabled".

    A name that several sections have, such as "enabled", says nothing about where it belongs.
    """
    if key in keys(Config):
        return key
    found = [f"{name}.{key}" for name, model in _sections().items() if _field(model, key) is not None]
    for name, model in _sections().items():
        inner = key.removeprefix(f"{name}_")
        if inner != key and _field(model, inner) is not None:
            found.append(f"{name}.{inner}")
    return found[0] if len(found) == 1 else None


def _near(key: str, choices: list[str]) -> str | None:
    """A key that `key` is likely to be a slip for: a few letters differ, or words are missing or too many."""
    close = nearest(key, choices, 0.75 if len(key) <= 5 else 0.85)
    if close:
        return close
    words = set(key.split("_"))
    for choice in choices:
        others = set(choice.split("_"))
        if min(len(words), len(others)) > 1 and (words <= others or others <= words):
            return choice
    return None


def _where(path: tuple[str, ...]) -> str:
    return f" in section {'.'.join(path)!r}" if path else ""


def refusal(key: str, path: tuple[str, ...]) -> str:
    """The sentence for a key that is not in the section at `path`."""
    model = section_model(path)
    close = nearest(key, keys(model)) if model else None
    close = close or (_near(key, keys(model)) if model else None)
    elsewhere = _elsewhere(key)
    if close:
        hint = f"did you mean {close!r}?"
    elif elsewhere:
        hint = f"the key is {elsewhere!r}"
    elif path in (("optimizer",), ("scheduler",)):
        hint = f"options of the {path[0]} belong in '{path[0]}.params'"
    else:
        hint = "remove it, or see docs/config.md for the keys there are"
    return f"unknown key {key!r}{_where(path)}: {hint}"


class _Walk:
    """One pass over a configuration; collects the dotted names of what is ignored."""

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.ignored: list[str] = []
        self.dotted: list[str] = []

    def _unknown(self, key: str, model: type[Section], path: tuple[str, ...]) -> None:
        head, dot, rest = key.partition(".")
        if not path and dot and rest and head in keys(Config) and not self.strict:
            self.dotted.append(key)
        elif self.strict or not model.ignores_unknown or _near(key, keys(model)) or _elsewhere(key):
            raise ConfigError(refusal(key, path))
        else:
            self.ignored.append(".".join((*path, key)))

    def section(
        self, values: Mapping[Any, Any], model: type[Section], path: tuple[str, ...]
    ) -> dict[str, Any]:
        """The section without the keys that are ignored."""
        kept = {}
        for key, value in values.items():
            if not isinstance(key, str):
                raise ConfigError(f"the key {key!r}{_where(path)} must be a string")
            info = _field(model, key)
            if info is None:
                self._unknown(key, model, path)
                continue
            inner = _section_of(info)
            nested = inner is not None and isinstance(value, Mapping)
            kept[key] = self.section(value, inner, (*path, key)) if nested and inner else value
        return kept

    def warnings(self) -> list[str]:
        """A sentence for each kind of what was ignored."""
        said = []
        if self.ignored:
            said.append(
                f"config {_listed(self.ignored)} ignored, as in DeepSpeed: nothing reads such a key "
                '("xtrain": {"strict": true} makes this an error)'
            )
        if self.dotted:
            said.append(
                f"config {_listed(self.dotted)} ignored, as in DeepSpeed: a name with dots is not looked up, so "
                "write the key inside its section"
            )
        return said


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names))
    return f"key {shown} is" if len(names) == 1 else f"keys {shown} are"


def drop_unknown(values: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the configuration without keys that nobody reads, what to say about them).

    Raises:
        ConfigError: an unknown key that is near a real one, or at the wrong level, or in a section where DeepSpeed
            refuses it too; any unknown key with `"xtrain": {"strict": true}`.
    """
    own = values.get("xtrain")
    walk = _Walk(strict=isinstance(own, Mapping) and own.get("strict") in (True, "true"))
    kept = walk.section(values, Config, ())
    return kept, walk.warnings()
