"""DeepSpeed's hostfiles (`worker-0 slots=4`), and the filters --include and --exclude.

Slots are the numbers of a host's devices: `slots=4` stands for 0 to 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from xtrain.base.errors import ConfigError, unknown_name
from xtrain.launch.nodes import Node

DEFAULT = "/job/hostfile"

Slots = dict[str, list[int]]
"""host -> its slots, in the order of the hostfile."""

# What follows the number (max_slots=, a comment) has never been looked at.
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")


def parse_lines(lines: Iterable[str], source: str) -> dict[str, int]:
    """host -> number of slots.

    Args:
        lines: the hostfile; empty lines and those that begin with # say nothing.
        source: its name, for errors.

    Raises:
        ConfigError: a line is of another form, a host appears twice, or there is none.
    """
    hosts: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ConfigError(f"{source}, line {number}: {line!r} is not of the form `HOST slots=NUMBER`")
        host, slots = match[1], int(match[2])
        if host in hosts:
            raise ConfigError(f"{source}, line {number}: host {host!r} is there a second time")
        if slots == 0:
            raise ConfigError(
                f"{source}, line {number}: {host!r} has no slot; remove the line, or give it one"
            )
        hosts[host] = slots
    if not hosts:
        raise ConfigError(f"{source} names no host: a line for each is needed, such as `worker-0 slots=4`")
    return hosts


def read(path: str | Path) -> dict[str, int] | None:
    """host -> number of slots; None if there is no such file.

    Raises:
        ConfigError: the file cannot be read, or is no hostfile.
    """
    if not Path(path).is_file():
        return None
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"hostfile {path} cannot be read: {error}") from None
    return parse_lines(lines, f"hostfile {path}")


def parse_filter(text: str) -> Slots:
    """`worker-0@worker-1:0,2` as host -> slots, sorted; none: the whole host.

    Raises:
        ConfigError: a slot is no number.
    """
    found: Slots = {}
    for part in text.split("@"):
        host, colon, slots = part.partition(":")
        listed = found.setdefault(host, [])
        for slot in slots.split(",") if colon else ():
            if not (slot.isascii() and slot.isdigit()):
                raise ConfigError(
                    f"{part!r} is not of the form HOST or HOST:SLOT,SLOT (hosts are joined by @): "
                    f"{slot!r} is no slot number"
                )
            listed.append(int(slot))
    return {host: sorted(set(slots)) for host, slots in found.items()}


def select(hosts: Mapping[str, Sequence[int]], include: str = "", exclude: str = "") -> Slots:
    """The hosts and slots that the filters leave, in the order of `hosts`; hosts without any are left out.

    Raises:
        ConfigError: both filters are given, or one names a host or slot that is not there.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude are both given: one says all that there is to say")
    named = parse_filter(include or exclude) if include or exclude else {}
    for host, slots in named.items():
        if host not in hosts:
            raise ConfigError(unknown_name("host", host, hosts))
        for slot in slots:
            if slot not in hosts[host]:
                there = ", ".join(map(str, hosts[host]))
                raise ConfigError(f"host {host!r} has no slot {slot}: it has {there}")
    left: Slots = {}
    for host, all_slots in hosts.items():
        # A host without a list of slots is meant as a whole.
        chosen = set(named[host] or all_slots) if host in named else set()
        left[host] = (
            list(all_slots) if not named else [s for s in all_slots if (s in chosen) == bool(include)]
        )
    return {host: slots for host, slots in left.items() if slots}


def nodes(slots: Slots) -> list[Node]:
    """A node for each host, with its slots as device numbers.

    Raises:
        ConfigError: there is none.
    """
    if not slots:
        raise ConfigError("no slot is left to run on: --exclude takes away all of them")
    return [Node(host, len(numbers), tuple(numbers)) for host, numbers in slots.items()]
