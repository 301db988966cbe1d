"""Small facts about processes on Linux, used by the launcher, the agents and the ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path


def die_with_parent(signal_number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when its parent dies, so that nothing is left behind.

    Args:
        parent: process number that the parent must have, when it is known; if it has died already, this
            process ends now.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    expected = os.getppid() if parent is None else parent
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal_number)
    if os.getppid() != expected:
        os.kill(os.getpid(), signal_number)


def safe_path_flag() -> list[str]:
    """Keep `python -m` from putting the current folder first on the path, where a `random.py` would hide
    Python's own; Python 3.10 cannot."""
    return ["-P"] if sys.version_info >= (3, 11) else []


def python_module(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this Python."""
    return [sys.executable, *safe_path_flag(), "-m", module, *arguments]


def free_port(address: str = "") -> int:
    """A port of this machine that nobody listens at now."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def process_state(pid: int) -> str:
    """The kernel's letter for what a process does: R runs, S sleeps, D waits for a disk or device, T is stopped, Z has
    ended; empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def processor_seconds(pid: int) -> float:
    """Processor time that a process has used; 0 when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0
