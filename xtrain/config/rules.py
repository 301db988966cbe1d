"""What happens to a configuration key that xtrain knows but does not act on.

Each field of the schema is implemented unless it carries one of these marks. Nothing is silent:
`NotYet` raises when the key asks for something, `NoEffect` is reported once at initialisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from xtrain.errors import ConfigError, NotImplementedYetError


@dataclass(frozen=True)
class NotYet:
    """The key turns on a feature that is not there yet. `instead`: what to do about it."""

    instead: str


@dataclass(frozen=True)
class NoEffect:
    """The key is accepted and changes nothing here. `reason`: why that is right."""

    reason: str


@dataclass(frozen=True)
class OnlyInStage3:
    """The key is implemented, and has no effect below ZeRO stage 3."""


@dataclass(frozen=True)
class OnlyNative:
    """The key is for xtrain's own engine; another engine refuses it. `fine`: values that ask it for nothing."""

    fine: tuple[Any, ...] = (None, False, 0)


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, "auto" means "not given"."""

    model_config = ConfigDict(extra="forbid", validate_default=True, populate_by_name=True)


def drop_auto(value: Any) -> Any:
    """Remove keys whose value is "auto" (Hugging Face's placeholder), as DeepSpeed does."""
    if not isinstance(value, dict):
        return value
    return {
        key: drop_auto(item) for key, item in value.items() if not (isinstance(item, str) and item == "auto")
    }


def _asks_for_something(value: Any, default: Any) -> bool:
    """Whether a value differs from leaving the key out.

    A section does not if it is disabled, if all it says is false, or if its device is "none".
    """
    if isinstance(value, dict):
        off = value.get("enabled", True) in (False, "false") or value.get("device") == "none"
        return not off and any(item not in (None, False, 0) for item in value.values())
    return value != default and not (default is None and value is False)


def _set_fields(section: Section, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, field info) of every key that the user wrote, depth first."""
    for name in sorted(section.model_fields_set):
        info = type(section).model_fields[name]
        dotted = f"{path}{info.alias or name}"
        value = getattr(section, name)
        yield dotted, value, info
        if isinstance(value, Section) and getattr(value, "enabled", True):
            yield from _set_fields(value, f"{dotted}.")


def apply_rules(config: Section, stage: int) -> list[str]:
    """Raise for the first key that asks for a feature not there yet; return notices of keys without effect."""
    notices: list[str] = []
    for dotted, value, info in _set_fields(config, ""):
        if not _asks_for_something(value, info.get_default(call_default_factory=True)):
            continue
        for mark in info.metadata:
            if isinstance(mark, NotYet):
                shown = "" if isinstance(value, dict | Section) else f" = {value!r}"
                raise NotImplementedYetError(f"config key {dotted!r}{shown}", mark.instead)
            if isinstance(mark, NoEffect):
                notices.append(f"config key {dotted!r} has no effect: {mark.reason}")
            if isinstance(mark, OnlyInStage3) and stage < 3:
                notices.append(f"config key {dotted!r} has no effect: it is only read in ZeRO stage 3")
    return notices


def apply_rules_of_deepspeed(config: Section) -> None:
    """Raise for the first key that DeepSpeed's engine cannot honour.

    What `NotYet` refuses, DeepSpeed has; what has no effect in xtrain's engine may have one in DeepSpeed's; which
    keys go together is its own affair.

    Raises:
        ConfigError: names the key.
    """
    for dotted, value, info in _set_fields(config, ""):
        for mark in info.metadata:
            if isinstance(mark, OnlyNative) and value not in mark.fine:
                raise ConfigError(
                    f"config key {dotted!r} = {value!r} is for xtrain's own engine, and 'xtrain.engine' is "
                    "'deepspeed': remove one of the two"
                )
