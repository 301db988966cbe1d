"""In which settings two configurations differ, which of them belong together, and mixtures of the two.

Only trees of plain values: what a configuration means, and whether a mixture can run, is found out elsewhere.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Key = tuple[str, ...]
Tree = dict[str, Any]

_DEEPSPEED = "deepspeed"
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
_PRECISIONS = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")
_LONGEST = 60


class _Absent:
    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()
"""The value of a key that a configuration does not have."""


@dataclass(frozen=True, eq=False)
class Change:
    """One key with its values in GOOD and BAD; `section` is the outermost section that only one of them has."""

    key: Key
    good: Any
    bad: Any
    section: Key | None = None

    @property
    def name(self) -> str:
        """The key with dots."""
        return ".".join(self.key)

    def sentence(self) -> str:
        """`key: value -> value`."""
        return f"{self.name}: {' -> '.join(self.values())}"

    def values(self) -> tuple[str, str]:
        """Both values as text; secrets are not shown."""
        return self._text(self.good), self._text(self.bad)

    def _text(self, value: Any) -> str:
        if self.key[-1].endswith("api_key") and value is not ABSENT:
            return "***"
        text = value if isinstance(value, str) else str(value) if value is ABSENT else json.dumps(value)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


@dataclass(frozen=True, eq=False)
class Setting:
    """Changes that are one decision: the first names it, the others follow from it."""

    changes: tuple[Change, ...]

    @property
    def name(self) -> str:
        """Of its first key."""
        return self.changes[0].name

    def sentence(self) -> str:
        """For a person."""
        followers = ", ".join(change.name for change in self.changes[1:])
        return self.changes[0].sentence() + (f" (with {followers})" if followers else "")


def find_changes(good: Tree, bad: Tree) -> list[Change]:
    """Every leaf in which they differ, in the order of GOOD; lists are leaves, a missing key is a difference."""
    return list(_walk(good, bad, (), None))


def _walk(good: Any, bad: Any, key: Key, section: Key | None) -> Iterator[Change]:
    one_is_absent = good is ABSENT or bad is ABSENT
    ours, theirs = ({} if side is ABSENT else side for side in (good, bad))
    if isinstance(ours, dict) and isinstance(theirs, dict) and (ours or theirs or not one_is_absent):
        if one_is_absent and section is None:
            section = key
        for name in dict.fromkeys([*ours, *theirs]):
            yield from _walk(ours.get(name, ABSENT), theirs.get(name, ABSENT), (*key, name), section)
    elif one_is_absent or json.dumps(good, sort_keys=True) != json.dumps(bad, sort_keys=True):
        yield Change(key, good, bad, section)


def follows(template: Tree, root: str = _DEEPSPEED) -> dict[Key, Key]:
    """For each key below `root` of an unresolved Hydra tree whose value is taken from another key: that key."""
    found = {}
    for change in find_changes({}, {root: template.get(root, {})}):
        if isinstance(change.bad, str) and (
            source := re.search(r"\$\{(?:oc\.select:)?([\w.]+)[},]", change.bad)
        ):
            found[change.key] = tuple(source[1].split("."))
    return found


def make_settings(changes: list[Change], sources: Mapping[Key, Key]) -> list[Setting]:
    """Changes, each with those that follow from it.

    Args:
        changes: in the order in which they are to be shown.
        sources: of a key, or section, that follows: what it follows. Where that is the same in both, it does not.
    """

    def leader(key: Key) -> Key | None:
        for length in range(len(key), 0, -1):
            if key[:length] in sources:
                return sources[key[:length]] + key[length:]
        return None

    def below(key: Key, section: Key | None) -> bool:
        return section is not None and key[: len(section)] == section

    asked = {source for change in changes if (source := leader(change.key))}
    leaders = {source for source in asked if any(below(change.key, source) for change in changes)}
    members: dict[Key, list[Change]] = {}
    for change in changes:
        followed = leader(change.key)
        mine = next(
            (source for source in leaders if source == followed or below(change.key, source)), change.key
        )
        members.setdefault(mine, []).append(change)
    return [
        Setting(tuple(sorted(found, key=lambda change: leader(change.key) is not None)))
        for found in members.values()
    ]


def _families(change: Change, retyped: set[str]) -> Iterator[object]:
    """What a change is a part of; changes of one family are made together first."""
    if change.section is not None:
        yield change.section
    key = change.key[1:] if change.key[0] == _DEEPSPEED else change.key
    if key[0] in _BATCH or key == ("cluster", "ranks_per_node"):
        yield "batch"
    elif key[0] in _PRECISIONS and key[-1] == "enabled":
        yield "precision"
    elif key[0] in retyped:
        yield key[0]
    elif key[0] == "backend" or key[:2] in (("xtrain", "backend"), ("xtrain", "fake")):
        yield "backend"


def group(settings: list[Setting]) -> list[tuple[Setting, ...]]:
    """Settings that need each other for a valid configuration, as far as that is known, in one group.

    Batch sizes that have to multiply; at most one precision; a type of optimizer or scheduler and its parameters; a
    backend and what it takes; all keys of a section that only one configuration has.
    """
    # A type's parameters belong to it: where the type is another one, they come with it.
    keys = [change.key for setting in settings for change in setting.changes]
    retyped = {
        key[-2]
        for key in keys
        if len(key) > 1 and key[-1] == "type" and key[-2] in ("optimizer", "scheduler")
    }
    groups: list[list[Setting]] = []
    members: list[set[object]] = []
    for setting in settings:
        families = {family for change in setting.changes for family in _families(change, retyped)}
        merged, place = [setting], len(groups)
        for i in reversed([i for i, others in enumerate(members) if others & families]):
            merged, place = groups.pop(i) + merged, i
            families |= members.pop(i)
        groups.insert(place, merged)
        members.insert(place, families)
    return [tuple(found) for found in groups]


def mix(good: Tree, bad: Tree, settings: Iterable[Setting]) -> Tree:
    """GOOD with these settings as they are in BAD; a new tree."""
    tree = copy.deepcopy(good)
    for setting in settings:
        for change in setting.changes:
            if change.bad is ABSENT:
                _remove(tree, bad, change.key)
            else:
                _put(tree, change.key, copy.deepcopy(change.bad))
    return tree


def _put(tree: Tree, key: Key, value: Any) -> None:
    for name in key[:-1]:
        tree = tree.setdefault(name, {})
    tree[key[-1]] = value


def _remove(tree: Tree, bad: Tree, key: Key) -> None:
    """Also sections that are empty then, unless BAD has them."""
    section = _at(tree, key[:-1])
    del section[key[-1]]
    if not section and len(key) > 1 and _at(bad, key[:-1]) is ABSENT:
        _remove(tree, bad, key[:-1])


def _at(tree: Any, key: Key) -> Any:
    for name in key:
        if not isinstance(tree, dict) or name not in tree:
            return ABSENT
        tree = tree[name]
    return tree
