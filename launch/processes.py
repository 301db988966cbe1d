"""Small facts about processes on Linux, used by the launcher, the agent and the ranks."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


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


def signal_name(number: int) -> str:
    """ "SIGKILL" for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
