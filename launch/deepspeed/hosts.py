"""A `deepspeed` command on several machines: ssh, srun or mpiexec start its parts, whose output comes together here."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import FrameType

from xtrain.base.errors import ConfigError, NotImplementedYetError
from xtrain.base.log import logger
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.launchers.agents import explain_silence
from xtrain.launch.launchers.mpi import program
from xtrain.launch.processes import python_module, signal_name

_POLITE = 10.0
"""Seconds that the other hosts get to end when one has failed."""


@dataclass
class _Part:
    """What runs for one host, or for all of them."""

    name: str
    process: subprocess.Popen[bytes]


def launch_on_nodes(invocation: Invocation) -> int:
    """Start the ranks on their machines and wait for them.

    Returns:
        0 when all have succeeded, the status of the first part that failed, or 128 + the signal that came.

    Raises:
        ConfigError: a machine cannot be reached, or the launcher is not there.
    """
    launcher = invocation.launcher
    if launcher == "mvapich":
        raise NotImplementedYetError("--launcher=mvapich", "give --launcher=mpich, openmpi or impi")
    if invocation.elastic:
        raise NotImplementedYetError(
            "--elastic_training on several hosts",
            "start it with xtrain launch cluster=hosts, which is elastic",
        )
    if launcher in ("openmpi", "mpich", "impi"):
        parts = [_start(launcher, _mpi(invocation), None)]
    else:
        first = invocation.nodes[0].name
        address = invocation.master_addr or (first if launcher == "slurm" else _address(invocation))
        made = replace(invocation, master_addr=address)
        if launcher == "slurm":
            parts = [_start("slurm", _srun(made), made)]
        else:
            parts = [_start(node.name, _ssh(made, rank), made) for rank, node in enumerate(made.nodes)]
    return _wait(parts)


# ---------------------------------------------------------------- commands


def _ssh_words(invocation: Invocation, host: str) -> list[str]:
    port = ["-p", str(invocation.ssh_port)] if invocation.ssh_port else []
    return ["ssh", "-T", "-o", "BatchMode=yes", *port, *invocation.launcher_args, host]


def _address(invocation: Invocation) -> str:
    """The first address of the first host, as DeepSpeed asks for it."""
    host = invocation.nodes[0].name
    words = [*_ssh_words(invocation, host), "hostname -I"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(
            "there is no ssh on this machine: install its client, or choose a --launcher"
        ) from None
    if done.returncode or not done.stdout.split():
        raise ConfigError(explain_silence(invocation.nodes[0], done.stderr.splitlines(), done.returncode))
    return done.stdout.split()[0]


def _part_words(invocation: Invocation, *arguments: str) -> str:
    """What runs on a host, for its shell."""
    path = os.environ.get("PYTHONPATH")
    environment = ["env", f"PYTHONPATH={path}"] if path else []
    words = [*environment, *python_module("xtrain.launch.deepspeed.on_node", *arguments)]
    before = f". {shlex.quote(invocation.venv_script)} && " if invocation.venv_script else ""
    return f"{before}exec {shlex.join(words)}"


def _ssh(invocation: Invocation, node_rank: int) -> list[str]:
    return [
        *_ssh_words(invocation, invocation.nodes[node_rank].name),
        _part_words(invocation, str(node_rank)),
    ]


def _srun(invocation: Invocation) -> list[str]:
    hosts = [node.name for node in invocation.nodes]
    count = str(len(hosts))
    return [
        "srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}",
        "--kill-on-bad-exit=1", "--label", "--input=all", *invocation.launcher_args,
        "bash", "-c", _part_words(invocation),
    ]  # fmt: skip


def _mpi(invocation: Invocation) -> list[str]:
    """mpiexec starts the ranks themselves; they are told who they are by MPI's variables."""
    hosts = [node.name for node in invocation.nodes]
    slots = {node.slots for node in invocation.nodes}
    environment = {**invocation.exports, "MASTER_PORT": str(invocation.master_port)}
    environment["MASTER_ADDR"] = invocation.master_addr or hosts[0]
    if invocation.launcher == "openmpi":
        words = [program("mpirun"), "-n", str(invocation.world_size)]
        words += ["--host", ",".join(f"{node.name}:{node.slots}" for node in invocation.nodes)]
        words += [word for key, value in sorted(environment.items()) for word in ("-x", f"{key}={value}")]
    else:
        if len(slots) > 1:
            raise ConfigError(
                f"--launcher={invocation.launcher}: every host needs the same number of slots, "
                f"and they have {', '.join(f'{node.name} {node.slots}' for node in invocation.nodes)}"
            )
        words = [program("mpirun"), "-n", str(invocation.world_size), "-ppn", str(slots.pop())]
        words += ["-hosts", ",".join(hosts)]
        words += [word for key, value in sorted(environment.items()) for word in ("-genv", key, value)]
    # As in DeepSpeed, ranks of mpirun get no --local_rank.
    return [*words, *invocation.launcher_args, *invocation.program, *invocation.arguments]


# ---------------------------------------------------------------- running


def _start(name: str, command: Sequence[str], invocation: Invocation | None) -> _Part:
    logger.debug("%s: %s", name, shlex.join(command))
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if invocation is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C comes to this process, which passes it on
        )
    except FileNotFoundError:
        raise ConfigError(
            f"there is no {command[0]} on this machine, which --launcher={name} needs"
        ) from None
    if invocation is not None:
        assert process.stdin is not None
        process.stdin.write(invocation.encode().encode() + b"\n")
        process.stdin.flush()
    prefix = f"{name}: " if invocation is not None and name != "slurm" else ""
    threading.Thread(target=_show, args=(process, prefix.encode()), daemon=True).start()
    return _Part(name, process)


def _show(process: subprocess.Popen[bytes], prefix: bytes) -> None:
    """A thread: a part's output, with the host before each line, as pdsh has it."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.buffer.write(prefix + line)
        sys.stdout.buffer.flush()


def _wait(parts: list[_Part]) -> int:
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)
        _end(parts, kill=len(received) > 1)

    before = {
        number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    status = 0
    try:
        while running := [part for part in parts if part.process.poll() is None]:
            failed = [part for part in parts if part.process.returncode not in (None, 0)]
            if failed and not status:
                status = _status(failed[0])
                _end(running, kill=False)
                until = time.monotonic() + _POLITE
            if status and time.monotonic() > until:
                _end(running, kill=True)
            time.sleep(0.05)
        failed = [part for part in parts if part.process.returncode]
        status = status or (_status(failed[0]) if failed else 0)
        time.sleep(0.1)  # the last lines of output
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else status


def _status(part: _Part) -> int:
    code = part.process.returncode
    how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with status {code}"
    logger.error("%s %s; the other hosts are ended", part.name, how)
    return int(128 - code if code < 0 else code)


def _end(parts: Sequence[_Part], kill: bool) -> None:
    """Politely, the input is closed and a part ends its ranks; or for certain."""
    for part in parts:
        if part.process.poll() is not None:
            continue
        if part.process.stdin is not None:
            part.process.stdin.close()
        if kill or part.process.stdin is None:
            os.killpg(part.process.pid, signal.SIGKILL if kill else signal.SIGTERM)
