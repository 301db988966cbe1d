"""DeepSpeed configurations in a repository: files, and dictionaries written in Python."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from xtrain.migrate.use import Use

_SURE = {"zero_optimization", "train_micro_batch_size_per_gpu", "zero_allow_untested_optimizer"}
_LIKELY = {
    "train_batch_size", "gradient_accumulation_steps", "fp16", "bf16", "optimizer", "scheduler",
    "steps_per_print", "gradient_clipping", "wall_clock_breakdown", "activation_checkpointing",
}  # fmt: skip
_SECTIONS = ("deepspeed", "deepspeed_config", "ds_config")
_MOST = 1_000_000  # bytes: larger files are data


def is_config(value: Any) -> bool:
    """Whether a value looks like a DeepSpeed configuration: a key that is DeepSpeed's alone and another, or four."""
    if not isinstance(value, dict):
        return False
    keys = {key for key in value if isinstance(key, str)}
    sure, likely = len(keys & _SURE), len(keys & _LIKELY)
    return (sure > 0 and sure + likely > 1) or ("train_batch_size" in keys and likely > 3)


def read_config(data: bytes, suffix: str, shown: str) -> list[Use]:
    """The configuration in a file of JSON or YAML, at its top or one section below."""
    if len(data) > _MOST or not any(word.encode() in data for word in (*_SURE, "train_batch_size")):
        return []
    try:
        value = json.loads(data) if suffix == ".json" else _yaml(data)
    except ValueError as error:
        if b"zero_optimization" in data:
            return [Use(shown, getattr(error, "lineno", 1), "unreadable", str(error))]
        return []
    text = data.decode("utf-8", "replace")
    if is_config(value):
        return [Use(shown, 1, "config", "file", value=value, source=text)]
    if not isinstance(value, dict):
        return []
    return [
        Use(shown, line_of(text, key), "config", f"section {key}", value=value[key], source=text)
        for key in _SECTIONS
        if is_config(value.get(key))
    ]


def _yaml(data: bytes) -> Any:
    import yaml

    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def line_of(text: str, key: str) -> int:
    """The first line that has a key, in quotes or before a colon; 1 if none has."""
    pattern = re.compile(rf"(?:[\"']{re.escape(key)}[\"']|\b{re.escape(key)})\s*:")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.search(line)), 1)


_UNKNOWN = object()


def literal(node: ast.expr) -> Any:
    """A literal's value; of dictionaries and lists what is literal in them, and a marker for what is not."""
    if isinstance(node, ast.Dict):
        return {
            key.value: value
            for key, inner in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant) and (value := literal(inner)) is not _UNKNOWN
        }
    if isinstance(node, ast.List | ast.Tuple):
        return [value for inner in node.elts if (value := literal(inner)) is not _UNKNOWN]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return _UNKNOWN


WHOLE, PART = "dictionary", "part of a dictionary"


def config_in_python(node: ast.Dict) -> tuple[str, dict[str, Any]] | None:
    """(WHOLE or PART, the literal part) of a dictionary that looks like a DeepSpeed configuration, else None."""
    keys = {key.value: True for key in node.keys if isinstance(key, ast.Constant)}
    if not is_config(keys):
        return None
    try:
        return WHOLE, ast.literal_eval(node)
    except (ValueError, TypeError):
        return PART, literal(node)
