"""DeepSpeed's `deepspeed.utils.numa`: which cores a rank gets."""

from __future__ import annotations

import shutil

from xtrain.launch.deepspeed.binding import binding, numa_nodes, parse_range, parse_range_list

__all__ = ["check_for_numactl_pkg", "get_numa_cores", "get_numactl_cmd", "parse_range", "parse_range_list"]


def get_numa_cores() -> list[list[int]]:
    """The processors of each NUMA node."""
    return list(numa_nodes().values())


def check_for_numactl_pkg() -> bool:
    """Whether numactl can be used."""
    return shutil.which("numactl") is not None


def get_numactl_cmd(
    bind_core_list: str | None, num_local_procs: int, local_rank: int
) -> tuple[int, list[str]]:
    """The number of cores of a rank, and what to put before its command; nothing without numactl."""
    own = binding(bind_core_list, num_local_procs, local_rank)
    return len(own.cores), own.prefix
