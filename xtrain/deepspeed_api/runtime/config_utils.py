"""`deepspeed.runtime.config_utils`: the base class of config sections, for sections of a script's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from xtrain.base.errors import ConfigError
from xtrain.base.log import logger
from xtrain.config.load import _no_duplicates
from xtrain.config.rules import drop_auto


class DeepSpeedConfigModel(BaseModel):
    """A section: unknown keys are errors, values are checked when they are set, and a field may be deprecated.

    A deprecated field has `json_schema_extra={"deprecated": True}`, and may name in there a `new_param` that takes
    its value (with dots for one of a section inside), `new_param_fn` that converts it, `set_new_param` (False: do
    not), and `deprecated_msg`.

    Args:
        strict: keep the value "auto", which otherwise means that the key was left out.

    Raises:
        ConfigError: a deprecated key is given together with the one that has replaced it.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_default=True,
        validate_assignment=True,
        use_enum_values=True,
        populate_by_name=True,
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )

    def __init__(self, strict: bool = False, **data: Any) -> None:
        super().__init__(**(data if strict else drop_auto(data)))
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("deprecated") and name in self.model_fields_set:
                self._replace(name, extra)

    def _replace(self, old: str, extra: Mapping[str, Any]) -> None:
        new = str(extra.get("new_param", ""))
        hint = f": use {new}" if new else ""
        logger.warning("config key %s is deprecated%s %s", old, hint, extra.get("deprecated_msg", ""))
        if not new or not extra.get("set_new_param", True):
            return
        *path, name = new.split(".")
        section: BaseModel = self
        for part in path:
            section = getattr(section, part)
        if name in section.model_fields_set:
            raise ConfigError(
                f"the keys {old!r}, which is deprecated, and {new!r} are both given: leave {old!r} out"
            )
        convert = extra.get("new_param_fn", lambda value: value)
        setattr(section, name, convert(getattr(self, old)))


def get_scalar_param(param_dict: Mapping[str, Any], param_name: str, param_default_value: Any) -> Any:
    """The value of a key, or the default."""
    return param_dict.get(param_name, param_default_value)


get_list_param = get_dict_param = get_scalar_param


def dict_raise_error_on_duplicate_keys(ordered_pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(object_pairs_hook=...)`.

    Raises:
        ConfigError: a key stands twice.
    """
    return _no_duplicates(list(ordered_pairs))


__all__ = [
    "DeepSpeedConfigModel",
    "dict_raise_error_on_duplicate_keys",
    "get_dict_param",
    "get_list_param",
    "get_scalar_param",
]
