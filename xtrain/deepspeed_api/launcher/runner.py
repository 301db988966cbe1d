"""DeepSpeed's `deepspeed.launcher.runner`: the command `deepspeed` as functions, for scripts that call or read it.

Mistakes are ConfigErrors, which are ValueErrors, with the sentences of `xtrain deepspeed`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtrain.base.errors import NotImplementedYetError
from xtrain.launch import hostfile
from xtrain.launch.deepspeed import command as deepspeed_command
from xtrain.launch.deepspeed import exports
from xtrain.launch.deepspeed import options as deepspeed_options
from xtrain.launcher.constants import (
    IMPI_LAUNCHER,
    MPICH_LAUNCHER,
    MVAPICH_LAUNCHER,
    OPENMPI_LAUNCHER,
    PDSH_LAUNCHER,
    SLURM_LAUNCHER,
)

__all__ = [
    "DEEPSPEED_ENVIRONMENT_NAME",
    "DEEPSPEED_ENVIRONMENT_PATHS",
    "DLTS_HOSTFILE",
    "EXPORT_ENVS",
    "IMPI_LAUNCHER",
    "MPICH_LAUNCHER",
    "MVAPICH_LAUNCHER",
    "OPENMPI_LAUNCHER",
    "PDSH_LAUNCHER",
    "SLURM_LAUNCHER",
    "apply_num_nodes_and_gpus",
    "encode_world_info",
    "fetch_hostfile",
    "main",
    "parse_args",
    "parse_inclusion_exclusion",
    "parse_node_config",
    "parse_node_config_list",
    "parse_resource_filter",
    "run_autotuning",
]

DLTS_HOSTFILE = hostfile.DEFAULT
EXPORT_ENVS = list(exports.BEGINNINGS)
"""Beginnings of names; what a script adds is exported by `main`, too."""
DEEPSPEED_ENVIRONMENT_NAME = exports.environment_file(os.environ)
DEEPSPEED_ENVIRONMENT_PATHS = [str(Path.home()), "."]


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options, `user_script` and `user_args`."""
    return deepspeed_options.parse(sys.argv[1:] if args is None else args)


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """host -> number of slots; None if there is no such file."""
    return hostfile.read(hostfile_path)


def _parse_hostfile(hostfile_lines: Iterable[str]) -> dict[str, int]:
    return hostfile.parse_lines(hostfile_lines, "the hostfile")


def parse_node_config(node_config: str) -> tuple[str, list[int]]:
    """`worker-0:0,2` as the host and its slots."""
    return next(iter(hostfile.parse_filter(node_config).items()))


def parse_node_config_list(node_config_list: str) -> dict[str, list[int]]:
    """`worker-0@worker-1:0,2` as host -> slots; none: the whole host."""
    return hostfile.parse_filter(node_config_list)


def parse_resource_filter(
    host_info: Mapping[str, Sequence[int]], include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """The slots that one of the filters leaves."""
    return hostfile.select(host_info, include_str, exclude_str)


def parse_inclusion_exclusion(
    resource_pool: Mapping[str, int], inclusion: str, exclusion: str
) -> dict[str, list[int]]:
    """As `parse_resource_filter`, for a hostfile's numbers of slots."""
    slots = {host: list(range(number)) for host, number in resource_pool.items()}
    return hostfile.select(slots, inclusion, exclusion)


def apply_num_nodes_and_gpus(
    active_resources: Mapping[str, list[int]], num_nodes: int, num_gpus: int
) -> dict[str, list[int]]:
    """The first hosts, with slots from 0 on; numbers below 1 change nothing."""
    hosts = list(active_resources)[: num_nodes if num_nodes > 0 else None]
    return {host: list(range(num_gpus)) if num_gpus > 0 else active_resources[host] for host in hosts}


def encode_world_info(world_info: Mapping[str, Any]) -> str:
    """Base64 of JSON."""
    return base64.urlsafe_b64encode(json.dumps(world_info).encode()).decode()


def run_autotuning(args: argparse.Namespace, active_resources: Mapping[str, list[int]]) -> None:
    """Not there yet."""
    raise NotImplementedYetError("autotuning", "set train_micro_batch_size_per_gpu by hand")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; leaves by sys.exit when it fails."""
    status = deepspeed_command.main(sys.argv[1:] if args is None else args, EXPORT_ENVS)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(deepspeed_command.command_line(sys.argv[1:]))
