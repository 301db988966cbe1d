"""`xtrain deepspeed`: DeepSpeed's command, its options checked before anything starts. Imports no torch.

One host is run by local.py, several by hosts.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path

from xtrain.base.errors import ConfigError, NotImplementedYetError, XtrainError, unknown_name
from xtrain.base.log import configure, logger
from xtrain.launch import devices, hostfile
from xtrain.launch.deepspeed import options as deepspeed_options
from xtrain.launch.deepspeed.binding import binding
from xtrain.launch.deepspeed.exports import BEGINNINGS, exports
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.deepspeed.local import run_local
from xtrain.launch.nodes import Node

PID_FOLDER = Path("/tmp")
"""Where DeepSpeed puts the files of --save_pid, and programs look for them."""


def main(given: Sequence[str], beginnings: Iterable[str] = BEGINNINGS) -> int:
    """Carry out the command; returns the exit status.

    Args:
        given: options, script and its arguments.
        beginnings: of the names of variables that ranks on other machines get.

    Raises:
        XtrainError: something is wrong with the options, the hostfile or this machine.
    """
    invocation = make_invocation(deepspeed_options.parse(given), beginnings)
    if invocation.here:
        return run_local(invocation)
    from xtrain.launch.deepspeed.hosts import launch_on_nodes

    return launch_on_nodes(invocation)


def command_line(given: Sequence[str]) -> int:
    """As `main`, with one sentence for what is wrong."""
    try:
        return main(given)
    except KeyboardInterrupt:  # before ranks are started
        print("xtrain: interrupted", file=sys.stderr)
        return 130
    except XtrainError as error:
        print(f"xtrain: error: {error}", file=sys.stderr)
        return error.exit_code


def make_invocation(args: argparse.Namespace, beginnings: Iterable[str] = BEGINNINGS) -> Invocation:
    """Check the options, and find out what they leave open.

    Raises:
        XtrainError: something is wrong with the options, the hostfile or this machine.
    """
    configure("error" if args.quiet else args.log_level)
    _check_options(args)
    cwd = Path.cwd()
    program = rank_program(args.user_script, args.module, args.no_python)
    nodes, variables, has_hostfile = _nodes(args)
    alone = len(nodes) == 1 and not args.force_multi
    here = alone or args.no_ssh
    made = Invocation(
        nodes=tuple(nodes),
        here=here,
        node_rank=_node_rank(args, nodes),
        program=program,
        arguments=tuple(args.user_args),
        local_rank_argument=not args.no_local_rank and not args.elastic_training,
        cwd=str(cwd),
        launcher=args.launcher.lower(),
        launcher_args=tuple(shlex.split(args.launcher_args)),
        hostfile=args.hostfile,
        exports={} if here else exports(os.environ, cwd, beginnings),
        device_variables=variables,
        master_addr=_master_addr(args, nodes, has_hostfile, here),
        master_port=args.master_port,
        ssh_port=args.ssh_port,
        ssh_check=not args.no_ssh_check,
        venv_script=args.venv_script,
        rank_logs=rank_logs(args.enable_each_rank_log),
        pid_file=str(PID_FOLDER / f"{os.getpid()}.deepspeed") if args.save_pid else None,
        bind_cores=args.bind_cores_to_rank,
        core_list=args.bind_core_list,
        elastic=_elastic(args, nodes),
        log_level="error" if args.quiet else args.log_level,
    )
    if here:
        check_machine(made)
        _tell_unused(args)
        if len(nodes) == 1:
            _tell_where(nodes[0])
            made = replace(made, nodes=(replace(nodes[0], name="localhost"),))
    return made


def _check_options(args: argparse.Namespace) -> None:
    """What can be seen from the options alone."""
    if args.autotuning:
        raise NotImplementedYetError("--autotuning", "set train_micro_batch_size_per_gpu by hand")
    if (args.num_nodes >= 0 or args.num_gpus >= 0) and (args.include or args.exclude):
        raise ConfigError("--num_nodes and --num_gpus cannot be given with --include or --exclude")
    for option in ("num_nodes", "num_gpus"):
        if getattr(args, option) == 0 or getattr(args, option) < -1:
            raise ConfigError(f"--{option}={getattr(args, option)}: at least one is needed")
    if args.launcher.lower() not in deepspeed_options.LAUNCHERS:
        raise ConfigError(unknown_name("launcher", args.launcher, deepspeed_options.LAUNCHERS))
    if not 0 < args.master_port < 65536:
        raise ConfigError(f"--master_port={args.master_port} is no port: it is between 1 and 65535")
    if args.elastic_training and args.no_local_rank:
        raise ConfigError(
            "--no_local_rank is for plain training: elastic training gives no --local_rank anyway"
        )
    if args.elastic_training and args.no_ssh:
        raise NotImplementedYetError(
            "--elastic_training with --no_ssh", "leave --no_ssh out, or --elastic_training"
        )
    if (args.min_elastic_nodes, args.max_elastic_nodes) != (-1, -1) and not args.elastic_training:
        raise ConfigError(
            "--min_elastic_nodes and --max_elastic_nodes are given with --elastic_training only"
        )
    # Scripts that pass these to DeepSpeed run, and are to run here.
    if args.bind_core_list is not None and not args.bind_cores_to_rank:
        logger.warning("--bind_core_list does nothing without --bind_cores_to_rank")
    if args.node_rank != -1 and not args.no_ssh:
        logger.warning("--node_rank does nothing without --no_ssh")
    try:
        shlex.split(args.launcher_args)
    except ValueError as error:
        raise ConfigError(f"--launcher_args {args.launcher_args!r} cannot be read: {error}") from None


def rank_program(script: str, module: bool, no_python: bool) -> tuple[str, ...]:
    """The command of a rank without the script's arguments.

    Raises:
        ConfigError: there is no such script, module or program.
    """
    if module and no_python:
        raise ConfigError("--module and --no_python are both given: a module is run by python")
    if no_python:
        if shutil.which(script) is None:
            raise ConfigError(f"--no_python: there is no program {script!r} that can be run")
        return (script,)
    if module:
        top = script.partition(".")[0]
        if PathFinder.find_spec(top, ["", *sys.path]) is None:
            raise ConfigError(f"--module: there is no module {top!r} in this folder or where Python looks")
        return (sys.executable, "-u", "-m", script)
    if not Path(script).exists():
        raise ConfigError(f"there is no script {script!r} in {Path.cwd()}")
    return (sys.executable, "-u", script)


# ---------------------------------------------------------------- which machines


def _nodes(args: argparse.Namespace) -> tuple[list[Node], tuple[str, ...], bool]:
    """(the nodes, variables that limit the devices a process here sees, whether a hostfile names them)."""
    hosts = hostfile.read(args.hostfile)
    if hosts is None:
        if args.hostfile != hostfile.DEFAULT:
            logger.warning("there is no hostfile %s: the ranks run on this machine", args.hostfile)
        node, variables = _this_machine(args)
        return [node], variables, False
    slots = hostfile.select(
        {host: list(range(number)) for host, number in hosts.items()}, args.include, args.exclude
    )
    nodes = hostfile.nodes(slots)
    if args.num_nodes > len(nodes):
        raise ConfigError(f"--num_nodes={args.num_nodes}: hostfile {args.hostfile} has {len(nodes)} hosts")
    if args.num_nodes > 0:
        nodes = nodes[: args.num_nodes]
    if args.num_gpus > 0:
        nodes = [Node(node.name, args.num_gpus, tuple(range(args.num_gpus))) for node in nodes]
    local = args.no_ssh or (len(nodes) == 1 and not args.force_multi)
    return nodes, devices.find().variables if local else (), True


def _this_machine(args: argparse.Namespace) -> tuple[Node, tuple[str, ...]]:
    """The node when there is no hostfile, and the variables that limit which devices a process sees."""
    if args.num_nodes > 1:
        raise ConfigError(
            f"--num_nodes={args.num_nodes}: there is no hostfile {args.hostfile} with other machines"
        )
    found = devices.find()
    if found.count is None:
        return _host_node(args), ()
    if args.num_gpus > found.count:
        raise ConfigError(f"--num_gpus={args.num_gpus}: this machine has {found.count} ({found.backend})")
    chosen = args.include or args.exclude or args.num_nodes > 0 or args.num_gpus > 0
    visible = next((os.environ[name] for name in found.variables if os.environ.get(name)), "")
    if visible and not chosen:
        numbers = visible.split(",")
        if not all(number.strip().isdigit() for number in numbers):  # UUIDs: the ranks inherit them
            return Node("localhost", len(numbers)), found.variables
        args.include = f"localhost:{','.join(number.strip() for number in numbers)}"
    elif visible:
        logger.warning("%s is ignored: an option says which devices to use", " and ".join(found.variables))
    slots = hostfile.select({"localhost": list(range(found.count))}, args.include, args.exclude)
    if args.num_gpus > 0:
        slots = {"localhost": list(range(args.num_gpus))}
    return hostfile.nodes(slots)[0], found.variables


def _host_node(args: argparse.Namespace) -> Node:
    """Host processors have no slots: there are as many as somebody asks for."""
    if args.num_gpus > 0:
        return Node("localhost", args.num_gpus)
    count = devices.host_ranks()
    if not (args.include or args.exclude):
        return Node("localhost", count)
    named = hostfile.parse_filter(args.include or args.exclude)
    there = range(max([count, *(slot + 1 for slots in named.values() for slot in slots if args.include)]))
    slots = hostfile.select({"localhost": list(there)}, args.include, args.exclude)
    return Node("localhost", len(hostfile.nodes(slots)[0].devices or ()))


def _node_rank(args: argparse.Namespace, nodes: list[Node]) -> int:
    if not args.no_ssh:
        return 0
    if not 0 <= args.node_rank < len(nodes):
        raise ConfigError(
            f"--no_ssh needs --node_rank=0 to {len(nodes) - 1}, which of the hosts this one is; it is {args.node_rank}"
        )
    return int(args.node_rank)


def _master_addr(args: argparse.Namespace, nodes: list[Node], has_hostfile: bool, here: bool) -> str | None:
    """None: it can only be found out by asking the first node."""
    if not has_hostfile or (here and len(nodes) == 1 and not args.master_addr):
        return "127.0.0.1"
    if args.master_addr or not here:
        return args.master_addr or None
    return nodes[0].name  # --no_ssh: nobody can be asked, and hosts find each other by name


def _elastic(args: argparse.Namespace, nodes: list[Node]) -> tuple[int, int] | None:
    if not args.elastic_training:
        return None
    low = 1 if args.min_elastic_nodes == -1 else args.min_elastic_nodes
    high = len(nodes) if args.max_elastic_nodes == -1 else args.max_elastic_nodes
    if low > len(nodes):
        raise ConfigError(f"--min_elastic_nodes={low}: there are not so many hosts, but {len(nodes)}")
    if not 1 <= low <= high:
        raise ConfigError(f"elastic training on {low} to {high} hosts: at least 1, and no more than the most")
    return low, high


def rank_logs(folder: str) -> str | None:
    """What the ranks' files begin with; the folder of --enable_each_rank_log is made.

    Raises:
        ConfigError: it cannot be made.
    """
    if folder == deepspeed_options.NO_LOGS:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--enable_each_rank_log={folder}: this folder cannot be made ({error.strerror})"
        ) from None
    return str(Path(folder).absolute() / f"{time.strftime('%Y%m%d%H%M%S')}_rank")


# ---------------------------------------------------------------- this machine


def check_machine(invocation: Invocation) -> None:
    """Find what would fail in the ranks of this machine, later and less clearly.

    Raises:
        ConfigError: the port is taken, or the cores cannot be divided.
    """
    node = invocation.nodes[invocation.node_rank]
    if invocation.bind_cores:
        binding(invocation.core_list, node.slots, 0)
    if invocation.node_rank == 0 and invocation.world_size > 1 and _is_taken(invocation.master_port):
        raise ConfigError(
            f"port {invocation.master_port} of this machine is taken, by another run perhaps: "
            "choose one by --master_port"
        )


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("", port))
        except OSError:
            return True
    return False


def _tell_unused(args: argparse.Namespace) -> None:
    """Options that only matter where other machines are reached; DeepSpeed takes them, too."""
    given = [name for name in ("launcher_args", "ssh_port", "venv_script") if getattr(args, name)]
    if given:
        names = " and ".join(f"--{name}" for name in given)
        logger.warning("%s: nothing is done with it, since ranks start on this machine only", names)


def _tell_where(node: Node) -> None:
    """DeepSpeed runs the only host of a hostfile on this machine, whatever it is called."""
    name = socket.gethostname()
    if node.name not in ("localhost", "127.0.0.1", name, name.partition(".")[0], socket.getfqdn()):
        logger.warning(
            "the ranks run on this machine (%s): --force_multi runs them on %s, through the launcher",
            name,
            node.name,
        )
