"""Slurm's short form of host names, written out: `n[08-10],gpu[1-2]x[0,3]`.

Names come one at a time, so that the first host of a list of thousands costs nothing. Slurm's own
`scontrol show hostnames` is not asked: it is absent in many containers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from xtrain.base.errors import ConfigError


@dataclass(frozen=True)
class _Range:
    """Numbers from `low` to `high`, padded with zeros to `width` digits."""

    low: int
    high: int
    width: int


# A name is a row of parts; a part is fixed text or the alternatives of one pair of brackets.
_Part = str | list["_Range | list[_Part]"]


def expand(text: str) -> Iterator[str]:
    """The hosts of a Slurm list, in its order; of several brackets the last one counts fastest.

    A number keeps the zeros of its range's first one: `n[08-10]` is n08, n09, n10. Brackets may stand
    inside brackets. The whole list is checked before the first name comes.

    Raises:
        ConfigError: the text is no such list; says at which character.

    Source: https://slurm.schedmd.com/scontrol.html (show hostnames)
    """
    names = _Reader(text).read()
    return (host for name in names for host in _spell(name))


def _spell(parts: list[_Part]) -> Iterator[str]:
    if not parts:
        yield ""
        return
    for head in _choices(parts[0]):
        for tail in _spell(parts[1:]):
            yield head + tail


def _choices(part: _Part) -> Iterator[str]:
    if isinstance(part, str):
        yield part
        return
    for item in part:
        if isinstance(item, _Range):
            yield from (f"{number:0{item.width}d}" for number in range(item.low, item.high + 1))
        else:
            yield from _spell(item)


class _Reader:
    """Reads a list from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text.strip()
        self.at = 0

    def read(self) -> list[list[_Part]]:
        names = [self._name()]
        while self._next() == ",":
            self.at += 1
            names.append(self._name())
        if self.at < len(self.text):
            raise self._wrong(f"{self._next()!r} is out of place")
        return names

    def _next(self) -> str:
        return self.text[self.at : self.at + 1]

    def _wrong(self, what: str) -> ConfigError:
        return ConfigError(f"the host list {self.text!r} cannot be read: at character {self.at + 1}, {what}")

    def _literal(self) -> str:
        start = self.at
        while self._next() and self._next() not in "[],":
            if self._next().isspace():
                raise self._wrong("there is a blank")
            self.at += 1
        return self.text[start : self.at]

    def _name(self) -> list[_Part]:
        parts: list[_Part] = []
        while self._next() and self._next() not in "],":
            parts.append(self._brackets() if self._next() == "[" else self._literal())
        if not parts:
            raise self._wrong("a name is missing")
        return parts

    def _brackets(self) -> list[_Range | list[_Part]]:
        items: list[_Range | list[_Part]] = []
        while not items or self._next() == ",":
            self.at += 1  # the opening bracket, or the comma
            items.append(self._item())
        if self._next() != "]":
            raise self._wrong("a bracket is not closed")
        self.at += 1
        return items

    def _item(self) -> _Range | list[_Part]:
        start = self.at
        name = self._name()
        if len(name) > 1 or not isinstance(name[0], str):
            return name
        low, dash, high = name[0].partition("-")
        if not (low.isascii() and low.isdigit()) or (dash and not (high.isascii() and high.isdigit())):
            self.at = start
            raise self._wrong(f"{name[0]!r} is neither a number nor a range of numbers")
        if dash and int(high) < int(low):
            self.at = start
            raise self._wrong(f"the range {name[0]} runs backwards")
        return _Range(int(low), int(high or low), len(low))
