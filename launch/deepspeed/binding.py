"""Ranks on cores of their own: --bind_cores_to_rank and --bind_core_list.

Cores are given to ranks in order, the same number to each; memory is bound to their NUMA node where there is numactl.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from xtrain.base.errors import ConfigError

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")


def parse_range(rng: str) -> range:
    """`3` or `2-5`.

    Raises:
        ConfigError: it is neither, or runs backwards.
    """
    low, dash, high = rng.partition("-")
    if not all(number.isascii() and number.isdigit() for number in ((low, high) if dash else (low,))):
        raise ConfigError(f"the core list has {rng!r}, which is neither a number nor a range such as 2-5")
    if dash and int(high) < int(low):
        raise ConfigError(f"the core list has the range {rng}, which runs backwards")
    return range(int(low), int(high or low) + 1)


def parse_range_list(range_str: str) -> list[int]:
    """`0,2-4,6` as [0, 2, 3, 4, 6].

    Raises:
        ConfigError: the text is no such list, or not in ascending order.
    """
    cores: list[int] = []
    for part in range_str.split(","):
        found = parse_range(part)
        if cores and found[0] <= cores[-1]:
            raise ConfigError(f"the core list {range_str!r} has to ascend: {part} comes too late")
        cores.extend(found)
    return cores


def _ranges(cores: list[int]) -> str:
    """[0, 1, 2, 5] as `0-2,5`."""
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def physical_cores() -> list[int]:
    """Of the processors that this process may use, the first one of each core."""
    allowed = os.sched_getaffinity(0)
    cores = []
    for number in sorted(allowed):
        siblings = _CPUS / f"cpu{number}" / "topology" / "thread_siblings_list"
        together = parse_range_list(siblings.read_text().strip()) if siblings.is_file() else [number]
        if number == min(set(together) & allowed, default=number):
            cores.append(number)
    return cores


def numa_nodes() -> dict[int, list[int]]:
    """NUMA node -> its processors; none for a node that is memory only."""
    found = {}
    for folder in _NODES.glob("node[0-9]*"):
        listed = (folder / "cpulist").read_text().strip()
        found[int(folder.name.removeprefix("node"))] = parse_range_list(listed) if listed else []
    return dict(sorted(found.items()))


def _memory(cores: list[int], nodes: Mapping[int, list[int]]) -> list[str]:
    """numactl's option for the memory of these cores; none if they are of several nodes."""
    home = next((node for node, its in nodes.items() if set(cores) <= set(its)), None)
    if home is None:
        return []
    full = [node for node, its in nodes.items() if its]
    empty = [node for node, its in nodes.items() if not its]
    if len(empty) == len(full):  # each node has one of fast memory beside it, which is preferred
        return ["-p", str(empty[full.index(home)])]
    # Several nodes with the same cores are one that the system was told to divide.
    return ["-m", ",".join(str(node) for node in full if nodes[node] == nodes[home])]


@dataclass(frozen=True)
class Binding:
    """The cores of one rank.

    Attributes:
        prefix: what to put before its command; empty where there is no numactl, and the process binds itself.
    """

    cores: list[int]
    prefix: list[str]


def binding(core_list: str | None, ranks: int, local_rank: int) -> Binding:
    """The cores of one of `ranks` ranks on this machine.

    Args:
        core_list: the cores to divide, such as `0-27,32-59`; None: all physical ones.

    Raises:
        ConfigError: there are fewer cores than ranks, the list is wrong, or KMP_AFFINITY is set.
    """
    if "KMP_AFFINITY" in os.environ:
        raise ConfigError(
            "KMP_AFFINITY is set, and decides about cores, too: unset it to bind ranks to cores"
        )
    cores = physical_cores() if core_list is None else parse_range_list(core_list)
    if missing := sorted(set(cores) - os.sched_getaffinity(0)):
        raise ConfigError(
            f"the core list {core_list!r} has cores that this process may not use: {_ranges(missing)}"
        )
    share = len(cores) // ranks
    if share == 0:
        raise ConfigError(f"{len(cores)} cores cannot be divided over {ranks} ranks: start fewer")
    own = cores[share * local_rank : share * (local_rank + 1)]
    if shutil.which("numactl") is None:
        return Binding(own, [])
    return Binding(own, ["numactl", *_memory(own, numa_nodes()), "-C", _ranges(own)])
