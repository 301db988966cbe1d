"""In what the settings and surroundings of two runs differ: most misalignments are a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ABSENT = "(absent)"
_WITHOUT = {
    "emulated": "(not emulated)",
    "environment.variables.": "(not set)",
    "environment.": "(none)",
    "backend": "(not recorded)",
}
"""What a key means that only the other header has, by how it begins."""
_SECTIONS = {"config": "(not recorded)", "environment": "(not recorded)"}
"""Told once, not key by key, where one of the headers has nothing of it at all."""
_ALWAYS = ("environment.variables",)
"""Sections that every header has: an empty one says nothing by itself."""
_NO_ENGINE = "none named (xtrain's Recorder alone)"
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
    if isinstance(value, dict) and (value or path in _ALWAYS):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value if isinstance(value, str) else repr(value)


def _with_engine(header: dict[str, Any]) -> dict[str, Any]:
    """The header with the engine that computed, and its version, under `engine`. Recorder alone names none."""
    named = dict(header)
    engine, version = named.get("engine", _NO_ENGINE), named.pop("deepspeed", None)
    named["engine"] = engine if version is None else f"{engine} {version}"
    return named


def _device(header: dict[str, Any]) -> str | None:
    environment = header.get("environment")
    device = environment.get("device") if isinstance(environment, dict) else None
    return None if device is None else str(device)


def _with_backend(header: dict[str, Any], other: dict[str, Any]) -> None:
    """Recorder alone names no backend: it is the other's where the device is and nothing is emulated, else what the
    device is called."""
    device = _device(header)
    if "backend" in header or "backend" not in other or device is None:
        return
    same = device == _device(other) and "emulated" not in other
    header["backend"] = other["backend"] if same else f"(device {device})"


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
    one, two = _with_engine(reference), _with_engine(candidate)
    _with_backend(one, two)
    _with_backend(two, one)
    sections = []
    for section, unknown in _SECTIONS.items():
        if bool(one.get(section)) != bool(two.get(section)):
            words = [unknown if not header.pop(section, None) else "(recorded)" for header in (one, two)]
            sections.append(Difference(section, *words))
    ours, theirs = _relevant(one), _relevant(two)
    found = [
        Difference(key, ours.get(key, _absent(key)), theirs.get(key, _absent(key)))
        for key in ours.keys() | theirs.keys()
        if ours.get(key) != theirs.get(key)
    ]
    return sorted(found + sections, key=lambda difference: _order(difference.key))


def _absent(key: str) -> str:
    return next((word for begin, word in _WITHOUT.items() if key.startswith(begin)), _ABSENT)
