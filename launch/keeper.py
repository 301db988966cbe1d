"""The process that the user has started: it keeps the launcher proper, its child, alive.

The child watches the run. When it is killed, the ranks end (nobody may train unwatched), and it is started again, to go
on from the newest checkpoint. This process does nothing else, so that it has little to die of.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from xtrain.base.errors import XtrainError
from xtrain.launch.processes import die_with_parent, signal_name

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_MOST = 5
"""Ends by a signal, in a row, after which the launcher itself is at fault."""
_LONG = 60.0
"""Seconds of running after which an end is not one of a row."""


def keep(work: Callable[[bool], int]) -> int:
    """Run `work` in a child, again when a signal ends it; its exit status.

    Args:
        work: told whether it is started again.
    """
    in_a_row = 0
    while True:
        began = time.monotonic()
        status = _once(work, again=in_a_row > 0)
        if not os.WIFSIGNALED(status):
            return os.waitstatus_to_exitcode(status)
        number = os.WTERMSIG(status)
        in_a_row = 1 if time.monotonic() - began > _LONG else in_a_row + 1
        if in_a_row >= _MOST:
            print(f"xtrain: the launcher was killed by {signal_name(number)} {_MOST} times", file=sys.stderr)
            return 128 + number
        print(
            f"xtrain: the launcher was killed by {signal_name(number)}; it is started again", file=sys.stderr
        )


def _once(work: Callable[[bool], int], again: bool) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        # Out of the terminal's group: a Ctrl-C comes through this process, once, as does `kill -INT`.
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # and it may still print, whatever `stty tostop` says
        # Without this process the launcher saves and ends.
        die_with_parent(signal.SIGTERM, parent)
        _in_child(work, again)

    def pass_on(number: int, _: FrameType | None) -> None:
        os.kill(child, number)

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        while True:
            pid, status = os.waitpid(child, 0)
            if pid == child:
                return status
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _in_child(work: Callable[[bool], int], again: bool) -> None:
    """Ends the child with the status of `work`; what is to be done at the end of Python is the parent's."""
    code = 1
    try:
        code = work(again)
    except XtrainError as error:
        print(f"xtrain: error: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
