"""Watches one run from start to end: progress, Ctrl-C, whose fault a failure was, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from xtrain.base.run_folder import CHECKPOINTS, EXIT_CODES, LAUNCHER_VARIABLE, LOGS, METRICS, STOP, STOPPED
from xtrain.launch.failure import Failure, culprit, rank_log, read_failures
from xtrain.launch.job import Job
from xtrain.launch.progress import ProgressDisplay, RecordTail

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""


@dataclass
class _Stop:
    """What the user asked for: `requests` counts Ctrl-C and SIGTERM; `since` is when the first came."""

    requests: int = 0
    since: float = field(default=0.0)

    def ask(self, *_: Any) -> None:
        self.requests += 1
        if self.requests == 1:
            self.since = time.monotonic()


@contextmanager
def _catching_signals(stop: _Stop) -> Iterator[None]:
    previous = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(job: Job) -> subprocess.Popen[bytes]:
    with (job.run_dir / LOGS / "agent.log").open("ab") as log:
        return subprocess.Popen(
            job.agent_command,
            env={**os.environ, **job.env, LAUNCHER_VARIABLE: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches the launcher alone
        )


def _end(agent: subprocess.Popen[bytes]) -> None:
    """End the agent and, through it, all ranks: politely, then for certain."""
    if agent.poll() is None:
        agent.terminate()  # torchrun's agent ends its ranks on SIGTERM
        try:
            agent.wait(timeout=10)
        except subprocess.TimeoutExpired:
            agent.kill()  # ranks die with their parent
            agent.wait()
    with suppress(ProcessLookupError):
        os.killpg(agent.pid, signal.SIGKILL)


def _exit_codes(run_dir: Path) -> dict[int, int]:
    path = run_dir / LOGS / EXIT_CODES
    return {int(rank): code for rank, code in json.loads(path.read_text()).items()} if path.exists() else {}


class Supervisor:
    """Runs a job; `run()` returns the exit status for the command line."""

    def __init__(self, job: Job, console: Console, debug: bool) -> None:
        self.job = job
        self.console = console
        self.debug = debug

    def run(self) -> int:
        """Start the ranks, follow them, report."""
        stop, tail = _Stop(), RecordTail(self.job.run_dir / METRICS)
        display = ProgressDisplay(self.console, self.job.total_steps, self.job.model)
        with _catching_signals(stop):
            agent = _start(self.job)
            try:
                killed = self._follow(agent, stop, tail, display)
            finally:
                _end(agent)
                display.update(tail.new_steps())
                display.close()
        if killed:
            self._say("ranks were killed before they could save a checkpoint", "red")
            return INTERRUPTED
        if agent.returncode:
            return self._report_failure(agent.returncode)
        # A stop that came after the last step found nothing to interrupt.
        return self._report_stopped() if (self.job.run_dir / STOPPED).exists() else 0

    def _say(self, text: str, style: str | None = None) -> None:
        # No markup: messages hold what users wrote, brackets included.
        self.console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    def _follow(
        self, agent: subprocess.Popen[bytes], stop: _Stop, tail: RecordTail, display: ProgressDisplay
    ) -> bool:
        """Until the agent ends or has to be killed (True)."""
        told = False
        while agent.poll() is None:
            display.update(tail.new_steps())
            if stop.requests and not told:
                (self.job.run_dir / STOP).touch()
                told = True
                self._say(
                    "stopping: ranks finish the step and save a checkpoint (Ctrl-C again kills them now)"
                )
            late = stop.requests and time.monotonic() - stop.since > self.job.stop_timeout
            if stop.requests > 1 or late:
                return True
            time.sleep(0.1)
        return False

    def _report_stopped(self) -> int:
        if self.job.resumable:
            self._say(f"stopped; continue with: xtrain launch resume={self.job.run_dir}", "bold")
        else:
            self._say(f"stopped; a checkpoint is in {self.job.run_dir / CHECKPOINTS}", "bold")
        return INTERRUPTED

    def _report_failure(self, agent_code: int) -> int:
        failure = culprit(read_failures(self.job.run_dir, _exit_codes(self.job.run_dir)))
        if failure is None:
            log = self.job.run_dir / LOGS / "agent.log"
            self._say(f"the launcher's agent ended with code {agent_code}; see {log}", "red")
            return 1
        if failure.user_error:
            self._say(f"xtrain: error: {failure.message}", "red")
            if self.debug and failure.traceback:
                self._say(failure.traceback)
            return failure.exit_code
        return self._report_crash(failure)

    def _report_crash(self, failure: Failure) -> int:
        log = rank_log(self.job.run_dir, failure.rank)
        verb = "" if failure.message.startswith(("was ", "exited ")) else "failed: "
        self._say(f"rank {failure.rank} {verb}{failure.message}; all ranks were ended", "red")
        lines = log.read_text(errors="replace").rstrip().splitlines() if log.exists() else []
        if self.debug and failure.traceback:
            self._say(failure.traceback)
        elif lines:
            self._say("its last lines were:")
            for line in lines[-5:]:
                self._say(f"  {line}")
        self._say(f"full log: {log}")
        return 1
