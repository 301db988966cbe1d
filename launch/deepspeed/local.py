"""Runs a `deepspeed` command on this machine: torchrun's agent in a process of its own, which starts the ranks."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from xtrain.base.errors import ConfigError
from xtrain.base.log import logger
from xtrain.base.run_folder import LAUNCHER_VARIABLE
from xtrain.launch.deepspeed.invocation import Invocation
from xtrain.launch.processes import python_module, signal_name

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_local(invocation: Invocation) -> int:
    """Start the ranks of this machine, and wait for them.

    The first Ctrl-C or SIGTERM ends the ranks by SIGTERM, the second one kills them.

    Returns:
        0 when all ranks have succeeded, the status of the first one that failed, or 128 + the signal that came.
    """
    node = invocation.nodes[invocation.node_rank]
    logger.info(
        "%d rank%s on %s: %s",
        node.slots,
        "" if node.slots == 1 else "s",
        node.name,
        shlex.join(invocation.command(0)),
    )
    with _pid_file(invocation.pid_file):
        command = python_module("xtrain.launch.deepspeed.agent", invocation.encode())
        # In the terminal's foreground, so that a rank can stop in a debugger.
        agent = subprocess.Popen(command, env={**os.environ, LAUNCHER_VARIABLE: str(os.getpid())})
        received = _wait(agent)
    if received is not None:
        return 128 + received
    if agent.returncode < 0:
        logger.error(
            "the ranks' agent was killed by %s, and the ranks with it", signal_name(-agent.returncode)
        )
        return 128 - agent.returncode
    return agent.returncode


def _wait(agent: subprocess.Popen[bytes]) -> int | None:
    """Wait for the agent's end; returns the first signal that came meanwhile."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # SIGTERM, whatever came: the agent does not listen to the terminal, whose Ctrl-C it gets, too.
        agent.send_signal(signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        agent.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0] if received else None


@contextmanager
def _pid_file(path: str | None) -> Iterator[None]:
    """The file of --save_pid, while the ranks run."""
    if path is None:
        yield
        return
    try:
        with Path(path).open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already, left by a process with the same number: remove it"
        ) from None
    print(f"launcher pid: {os.getpid()}", flush=True)
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
