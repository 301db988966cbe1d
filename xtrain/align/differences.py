"""In what the settings and surroundings of two runs differ: most misalignments are a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ABSENT = "(absent)"
_IRRELEVANT = {"type", "started", "from_step", "version", "modules_every"}
_IRRELEVANT_CONFIG = tuple(
    f"config.{key}"
    for key in (
        "xtrain.record",
        "steps_per_print",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "wall_clock_breakdown",
    )
)


@dataclass(frozen=True)
class Difference:
    """A setting that two runs have not in common; values as text."""

    key: str
    reference: str
    candidate: str

    def sentence(self) -> str:
        """For a person."""
        return f"{self.key}: {self.reference} in the reference, {self.candidate} in the candidate"


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else repr(value)


def _relevant(header: dict[str, Any]) -> dict[str, str]:
    kept = {key: value for key, value in header.items() if key not in _IRRELEVANT}
    return {
        key: text
        for key, text in _flat(kept, "")
        if not any(key == other or key.startswith(f"{other}.") for other in _IRRELEVANT_CONFIG)
    }


def _order(key: str) -> tuple[int, str]:
    kinds = (
        "config.",
        "engine",
        "backend",
        "numerics",
        "world_size",
        "xtrain",
        "torch",
        "python",
        "environment.",
    )
    return next((i for i, kind in enumerate(kinds) if key.startswith(kind)), len(kinds)), key


def header_differences(reference: dict[str, Any], candidate: dict[str, Any]) -> list[Difference]:
    """Differences of two headers: configuration first, then who computed, then where.

    None where one of the files has no header: nothing is known then.
    """
    if not reference or not candidate:
        return []
    ours, theirs = _relevant(reference), _relevant(candidate)
    return [
        Difference(key, ours.get(key, _ABSENT), theirs.get(key, _ABSENT))
        for key in sorted(ours.keys() | theirs.keys(), key=_order)
        if ours.get(key) != theirs.get(key)
    ]
