"""What happens to a configuration key that xtrain knows but does not act on.

Each field of the schema is implemented unless it carries one of these marks. Nothing is silent:
`NotYet` raises when the key asks for something, `NoEffect` is reported once at initialisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from xtrain.base.errors import ConfigError, NotImplementedYetError


@dataclass(frozen=True)
class NotYet:
    """The key turns on a feature that is not there yet.

    Attributes:
        instead: what to do about it.
        switch: the entry of a section without which, or with one of `off`, the section asks for nothing.
        by_presence: in DeepSpeed the section turns the feature on, even with nothing in it.
    """

    instead: str
    switch: str | None = None
    off: tuple[Any, ...] = (None, False, 0, "false")
    by_presence: bool = False


@dataclass(frozen=True)
class NoEffect:
    """The key is accepted and changes nothing here. `reason`: why that is right."""

    reason: str


@dataclass(frozen=True)
class OnlyInStage3:
    """The key has no effect below ZeRO stage 3."""


@dataclass(frozen=True)
class OnlyNative:
    """The key is for xtrain's own engine; another engine refuses it. `fine`: values that ask it for nothing."""

    fine: tuple[Any, ...] = (None, False, 0)


def _is_number(annotation: Any) -> bool:
    """Whether a field holds a number, and no truth value."""
    if get_origin(annotation) is Annotated:
        return _is_number(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return any(map(_is_number, get_args(annotation)))
    return annotation in (int, float)


class Section(BaseModel):
    """A part of the configuration: "auto" means "not given", numbers are finite, and no number is a truth value.

    The text below a field says what the key does; docs/config.md is made of it (document.py). pydantic could read it
    as well (`use_attribute_docstrings`), but then `import xtrain` would take twice the time for the schema.
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, populate_by_name=True, allow_inf_nan=False
    )
    ignores_unknown: ClassVar[bool] = False
    """DeepSpeed reads the section key by key, so that keys which nobody knows are ignored there."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        if isinstance(value, bool) and _is_number(cls.model_fields[info.field_name].annotation):
            raise ValueError("it must be a number, not true or false")
        return value


FeatureDict = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is False else value)]
"""A section of a feature that is not there yet: only looked at for whether it asks for something."""


def drop_auto(value: Any) -> Any:
    """Remove keys whose value is "auto" (Hugging Face's placeholder), as DeepSpeed does."""
    if not isinstance(value, dict):
        return value
    return {
        key: drop_auto(item) for key, item in value.items() if not (isinstance(item, str) and item == "auto")
    }


_NOTHING = (None, False, 0, "", "false", "none")


def _says_something(value: Any) -> bool:
    """Whether a section has an entry, at any depth, that is neither off nor empty."""
    if isinstance(value, dict):
        off = value.get("enabled", True) in (False, "false") or value.get("device") == "none"
        off = off or not _says_something(value.get("shared_parameters", True))  # of compression_training
        return not off and any(_says_something(item) for item in value.values())
    if isinstance(value, list):
        return any(_says_something(item) for item in value)
    return value not in _NOTHING


def _asks_for_something(value: Any, info: FieldInfo) -> bool:
    """Whether a value differs from leaving the key out.

    A section does not if it is disabled, if all it says is false, or if its device is "none".
    """
    if isinstance(value, dict):
        if any(isinstance(mark, NotYet) and mark.by_presence for mark in info.metadata):
            return True
        switches = [mark for mark in info.metadata if isinstance(mark, NotYet) and mark.switch]
        off = any(value.get(mark.switch or "") in mark.off for mark in switches)
        return not off and _says_something(value)
    default = info.get_default(call_default_factory=True)
    return bool(value != default) and not (default is None and value is False)


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
        if not _asks_for_something(value, info):
            continue
        unused = stage < 3 and any(isinstance(mark, OnlyInStage3) for mark in info.metadata)
        for mark in info.metadata:
            if isinstance(mark, NotYet) and not unused:
                shown = "" if isinstance(value, dict | Section) else f" = {value!r}"
                raise NotImplementedYetError(f"config key {dotted!r}{shown}", mark.instead)
            if isinstance(mark, NoEffect):
                notices.append(f"config key {dotted!r} has no effect: {mark.reason}")
            if isinstance(mark, OnlyInStage3) and unused:
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
