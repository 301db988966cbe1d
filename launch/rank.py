"""What every rank runs: `python -m xtrain.launch.rank [--pass-local-rank] SCRIPT ARGS`.

Sends output to the rank's log, runs the script as `__main__`, and writes down why it ended.
"""

from __future__ import annotations

import faulthandler
import os
import re
import runpy
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

from xtrain.base import heartbeat
from xtrain.base.errors import PeerLostError, RunInterrupted, XtrainError
from xtrain.base.run_folder import ATTEMPT_VARIABLE, RUN_DIR_VARIABLE, STORE_VARIABLE
from xtrain.launch.builtin import BUILTIN, builtin_script
from xtrain.launch.failure import Failure, killed, rank_log, write_failure
from xtrain.launch.processes import die_with_parent
from xtrain.launch.script_options import PASS_LOCAL_RANK
from xtrain.launch.survey import STACKS_SIGNAL
from xtrain.shims import process, where


def _redirect_output(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.close(descriptor)


def _own_rank() -> int:
    """From torchrun's variable, or from those of mpiexec."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"])
    from xtrain.comm.launchers import launched

    told = launched(os.environ)
    return 0 if told is None else told.rank


def _run(script: str, args: list[str]) -> None:
    if STORE_VARIABLE in os.environ:
        from xtrain.comm.store import serve_environment

        serve_environment()  # for a script that calls torch.distributed.init_process_group() by itself
    if script == BUILTIN:
        script = str(builtin_script())
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _with_local_rank(words: list[str]) -> list[str]:
    """The script and its arguments; --local_rank=N before them where it is asked for."""
    if words[0] != PASS_LOCAL_RANK:
        return words
    from xtrain.comm.launchers import launched

    told = launched(os.environ)
    local = os.environ.get("LOCAL_RANK") or (0 if told is None else told.local_rank)
    return [words[1], f"--local_rank={local}", *words[2:]]


def _failure(rank: int, error: BaseException) -> Failure:
    if isinstance(error, PeerLostError):  # the other rank's failure is the one to tell
        told = traceback.format_exc()
        return Failure(rank, str(error), error.exit_code, time.time(), traceback=told, consequence=True)
    if isinstance(error, XtrainError):
        line = where.user_line(error.__traceback__) if process.is_installed() else None
        said = str(error) if line is None else f"{line}: {error}"
        return Failure(
            rank, said, error.exit_code, time.time(), user_error=True, traceback=traceback.format_exc()
        )
    message = f"{type(error).__name__}: {error}".strip()
    return Failure(rank, message, 1, time.time(), traceback=traceback.format_exc())


def _last_line(log: Path) -> str:
    """What a script that called sys.exit(code) said last, without argparse's `prog: error: `."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"^\S+: error: ", "", lines[-1]) if lines else "ended without a message"


def _left(run_dir: Path, rank: int, leave: SystemExit) -> Failure:
    """The failure of a script that has called sys.exit() with something else than 0."""
    code = leave.code if isinstance(leave.code, int) else 1
    if isinstance(leave.__context__, PeerLostError):  # the script has caught it, and leaves for it
        return replace(_failure(rank, leave.__context__), exit_code=code)
    message = leave.code if isinstance(leave.code, str) else _last_line(rank_log(run_dir, rank))
    return Failure(rank, message, code, time.time(), user_error=code == 2)


def _leave_a_witness(run_dir: Path, rank: int) -> None:
    """Go on as a child; the parent does nothing but write down which signal has ended it.

    mpiexec ends all ranks when one is killed, and MPICH then names any of them.
    """
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        die_with_parent(parent=parent)
        return
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: os.kill(child, number))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        write_failure(run_dir, killed(rank, code))
    os._exit(code if code >= 0 else 128 - code)


def main() -> int:
    """Run the script; returns the exit status of the rank."""
    die_with_parent()
    run_dir, rank = Path(os.environ[RUN_DIR_VARIABLE]), _own_rank()
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # no agent watches it
        _leave_a_witness(run_dir, rank)
    _redirect_output(rank_log(run_dir, rank))
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    heartbeat.start(rank)
    if (attempt := os.environ.get(ATTEMPT_VARIABLE, "1")) != "1":
        print(f"xtrain: start {attempt} of this run")
    try:
        process.in_child()
        script, *args = _with_local_rank(sys.argv[1:])
        _run(script, args)
    except RunInterrupted as stop:
        print(f"xtrain: {stop}")
        return 0
    except SystemExit as leave:
        if leave.code is None or leave.code == 0:
            return 0
        failure = _left(run_dir, rank, leave)
        write_failure(run_dir, failure)
        return failure.exit_code
    except BaseException as error:
        failure = _failure(rank, error)
        write_failure(run_dir, failure)
        print(failure.traceback, file=sys.stderr)
        return failure.exit_code
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without a process group to close, interpreter shutdown could wait for peers that are gone.
    os._exit(status) if status else sys.exit(0)
