"""The options of the `deepspeed` command, spelled as DeepSpeed 0.19.8 has them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from xtrain.launch import hostfile

LAUNCHERS = ("pdsh", "openmpi", "mpich", "impi", "slurm", "mvapich")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
DEFAULT_PORT = 29500
NO_LOGS = "None"
"""What --enable_each_rank_log is when nobody has given it, and when somebody gives DeepSpeed's default."""


def _nodes(add: argparse._ArgumentGroup) -> None:
    add.add_argument(
        "-H",
        "--hostfile",
        default=hostfile.DEFAULT,
        metavar="FILE",
        help="lines `HOST slots=NUMBER`; without it, this machine",
    )
    add.add_argument(
        "-i", "--include", default="", metavar="HOSTS", help="run on these alone, as in worker-0@worker-1:0,2"
    )
    add.add_argument(
        "-e", "--exclude", default="", metavar="HOSTS", help="run on all but these, in the same form"
    )
    add.add_argument("--num_nodes", type=int, default=-1, metavar="N", help="the first N hosts")
    add.add_argument(
        "--num_gpus",
        "--num_accelerators",
        type=int,
        default=-1,
        metavar="N",
        help="ranks, and devices, of each host",
    )
    add.add_argument(
        "--min_elastic_nodes", type=int, default=-1, metavar="N", help="fewest hosts of elastic training"
    )
    add.add_argument(
        "--max_elastic_nodes", type=int, default=-1, metavar="N", help="most hosts of elastic training"
    )
    add.add_argument("--elastic_training", action="store_true", help="start ranks again when one has failed")
    add.add_argument("--force_multi", action="store_true", help="use the launcher for a single host, too")


def _reaching(add: argparse._ArgumentGroup) -> None:
    add.add_argument(
        "--launcher", default="pdsh", metavar="NAME", help=f"how hosts are reached: {', '.join(LAUNCHERS)}"
    )
    add.add_argument("--launcher_args", default="", metavar="'ARGS'", help="more arguments for it, in quotes")
    add.add_argument("--master_addr", default="", metavar="HOST", help="address of rank 0")
    add.add_argument("--master_port", type=int, default=DEFAULT_PORT, metavar="PORT", help="port of rank 0")
    add.add_argument(
        "--no_ssh", action="store_true", help="start the ranks of this host; the command is given on each"
    )
    add.add_argument(
        "--node_rank", type=int, default=-1, metavar="N", help="with --no_ssh: which host this one is"
    )
    add.add_argument("--no_ssh_check", action="store_true", help="do not try ssh first")
    add.add_argument("--ssh_port", type=int, default=None, metavar="PORT", help="port of ssh")
    add.add_argument("--venv_script", default=None, metavar="FILE", help="shell script that hosts read first")


def _running(add: argparse._ArgumentGroup) -> None:
    add.add_argument("--module", action="store_true", help="the script is a module, as for python -m")
    add.add_argument("--no_python", action="store_true", help="the script is a program, run without python")
    add.add_argument("--no_local_rank", action="store_true", help="do not give the script --local_rank=N")
    add.add_argument("--bind_cores_to_rank", action="store_true", help="give each rank cores of its own")
    add.add_argument("--bind_core_list", default=None, metavar="CORES", help="of these, as in 0-27,32-59")
    add.add_argument(
        "--enable_each_rank_log",
        default=NO_LOGS,
        metavar="FOLDER",
        help="ranks write to files in this folder",
    )
    add.add_argument("--log_level", default="info", choices=LOG_LEVELS, help="of the launcher's own messages")
    add.add_argument("-q", "--quiet", action="store_true", help="as --log_level error")


def parser() -> argparse.ArgumentParser:
    """Reads the options, `user_script` and `user_args`."""
    made = argparse.ArgumentParser(
        prog="xtrain deepspeed",
        usage="xtrain deepspeed [options] script [arguments of the script]",
        description="Start a script on every device, as the command `deepspeed` does.",
    )
    _nodes(made.add_argument_group("where"))
    _reaching(made.add_argument_group("several hosts"))
    how = made.add_argument_group("how")
    _running(how)
    how.add_argument("--save_pid", action="store_true", help="write /tmp/PID.deepspeed while ranks run")
    how.add_argument("--autotuning", default="", choices=["tune", "run"], help="not there in xtrain")
    made.add_argument("user_script", help="the training script")
    made.add_argument("user_args", nargs=argparse.REMAINDER, help="its own arguments, as they are")
    return made


def node_parser() -> argparse.ArgumentParser:
    """The same for DeepSpeed's inner command `python -m deepspeed.launcher.launch`, which is given on each node."""
    made = argparse.ArgumentParser(
        prog="deepspeed.launcher.launch",
        usage="python -m deepspeed.launcher.launch [options] script [arguments of the script]",
        description="Start the ranks of one node.",
    )
    add = made.add_argument_group("which")
    add.add_argument(
        "--world_info", required=True, metavar="BASE64", help="of JSON: host -> its device numbers"
    )
    add.add_argument("--node_rank", type=int, default=0, metavar="N", help="which of the hosts this one is")
    add.add_argument("--master_addr", default="127.0.0.1", metavar="HOST", help="address of rank 0")
    add.add_argument("--master_port", type=int, default=DEFAULT_PORT, metavar="PORT", help="port of rank 0")
    how = made.add_argument_group("how")
    _running(how)
    how.add_argument(
        "--save_pid", type=int, default=0, metavar="PID", help="write /tmp/PID.deepspeed while ranks run"
    )
    made.add_argument("user_script", help="the training script")
    made.add_argument("user_args", nargs=argparse.REMAINDER, help="its own arguments, as they are")
    return made


def parse(given: Sequence[str], by: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The options. Whatever follows the script is its own, and stays as it is."""
    args = (by or parser()).parse_args(list(given))
    before = list(given[: len(given) - len(args.user_args)])
    if before[-2:] == [args.user_script, "--"]:  # argparse takes a `--` behind the script for its own
        args.user_args.insert(0, "--")
    return args
