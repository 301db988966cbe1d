"""DeepSpeed's inner command, which its launcher gives on each node, and which batch scripts give themselves:

`srun python -m deepspeed.launcher.launch --world_info=... --node_rank=$SLURM_PROCID --master_addr=... train.py`
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from xtrain.base.errors import ConfigError, XtrainError
from xtrain.base.log import configure
from xtrain.launch import devices, hostfile
from xtrain.launch.deepspeed import options as deepspeed_options
from xtrain.launch.deepspeed.command import PID_FOLDER, check_machine, rank_logs, rank_program
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.deepspeed.local import run_local
from xtrain.launch.nodes import Node


def read_world(text: str) -> tuple[Node, ...]:
    """The nodes of --world_info.

    Raises:
        ConfigError: it is not base64 of JSON with device numbers for each host.
    """
    try:
        world = json.loads(base64.urlsafe_b64decode(text))
        hosts = {host: [int(number) for number in numbers] for host, numbers in world.items()}
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(
            f'--world_info={text} cannot be read: it is base64 of JSON such as {{"worker-0": [0, 1]}}'
        ) from None
    if not hosts or not all(hosts.values()):
        raise ConfigError(f"--world_info={text}: each host needs at least one device number")
    return tuple(hostfile.nodes(hosts))


def make_invocation(given: Sequence[str]) -> Invocation:
    """Check the options.

    Raises:
        XtrainError: something is wrong with them, or with this machine.
    """
    args = deepspeed_options.parse(given, deepspeed_options.node_parser())
    level = "error" if args.quiet else args.log_level
    configure(level)
    nodes = read_world(args.world_info)
    if not 0 <= args.node_rank < len(nodes):
        raise ConfigError(
            f"--node_rank={args.node_rank}: --world_info has {len(nodes)} hosts, numbered from 0"
        )
    made = Invocation(
        nodes=nodes,
        here=True,
        node_rank=args.node_rank,
        program=rank_program(args.user_script, args.module, args.no_python),
        arguments=tuple(args.user_args),
        local_rank_argument=not args.no_local_rank,
        cwd=str(Path.cwd()),
        launcher="",
        launcher_args=(),
        hostfile="",
        exports={},
        device_variables=devices.find().variables,
        master_addr=args.master_addr,
        master_port=args.master_port,
        ssh_port=None,
        ssh_check=False,
        venv_script=None,
        rank_logs=rank_logs(args.enable_each_rank_log),
        pid_file=str(PID_FOLDER / f"{args.save_pid}.deepspeed") if args.save_pid else None,
        bind_cores=args.bind_cores_to_rank,
        core_list=args.bind_core_list,
        elastic=None,
        log_level=level,
    )
    check_machine(made)
    return made


def command_line(given: Sequence[str]) -> int:
    """Start the ranks; returns the exit status, with one sentence for what is wrong."""
    try:
        return run_local(make_invocation(given))
    except XtrainError as error:
        print(f"xtrain: error: {error}", file=sys.stderr)
        return error.exit_code
