"""One start of a run's ranks by mpiexec or a queue's own starter: there are no agents, and the run folder is shared.

What agents say elsewhere is read from the run folder: signs of life, and what failed ranks have written.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from xtrain.base import heartbeat
from xtrain.base.errors import ConfigError
from xtrain.base.files import write_text
from xtrain.base.run_folder import ATTEMPT_VARIABLE, HEARTBEAT_VARIABLE, LOGS, SIGNALLED, STOP, STOPPED
from xtrain.launch.failure import Failure, forget_failures, killed, last_lines, rank_log, read_failure
from xtrain.launch.files import lines_since
from xtrain.launch.hang import Pulses
from xtrain.launch.job import Job
from xtrain.launch.launchers import mpi, sunway
from xtrain.launch.nodes import Layout
from xtrain.launch.processes import process_state
from xtrain.launch.stacks import ask_for_stacks
from xtrain.launch.start import Outcome

_LOOK = 0.5
"""Seconds between two looks at the signs of life."""
_STACKS = 2.0
"""Seconds that ranks get to write their stacks."""
_POLITE = 10.0
"""Seconds that mpiexec gets to end."""
_SIGNAL = re.compile(r"EXIT STRING: .*\(signal (\d+)\)|exited on signal (\d+)|KILLED BY SIGNAL: (\d+)")
_RANK = re.compile(r"process rank (\d+) with PID")
_PID = re.compile(r"PID (\d+) RUNNING AT")
"""What MPICH, Open MPI and Intel MPI print about the rank that was killed."""


class CommandStart:
    """The ranks of one start; begins at once.

    Raises:
        ConfigError: the command is not there.
    """

    def __init__(self, job: Job, layout: Layout, number: int) -> None:
        self._job, self._layout = job, layout
        self.troubles: list[str] = []
        self._logs = job.run_dir / LOGS
        self._log = self._logs / f"{job.cluster.launcher}.log"
        self._hearts = self._logs / "hearts"
        self._pulses = Pulses()
        self._next_look = self._next_stacks = 0.0
        self._prepare()
        environment = {**job.env, ATTEMPT_VARIABLE: str(number), HEARTBEAT_VARIABLE: str(self._hearts)}
        module = sunway if job.cluster.launcher == "sunway" else mpi
        command = module.command(job, layout, environment)
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        try:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except FileNotFoundError:
            raise ConfigError(
                f"there is no {command[0]} on this machine: put it on the PATH, or choose another cluster"
            ) from None

    def _prepare(self) -> None:
        shutil.rmtree(self._hearts, ignore_errors=True)
        self._hearts.mkdir(parents=True)
        for name in (STOP, STOPPED, SIGNALLED):
            (self._job.run_dir / name).unlink(missing_ok=True)
        forget_failures(self._job.run_dir, range(self._job.ranks))
        write_text(self._job.run_dir / "ds_config.json", self._job.config_for(self._layout.ranks))

    @property
    def _here(self) -> bool:
        """Whether all ranks are processes of this machine."""
        return all(node.name == "localhost" for node in self._layout.nodes)

    def poll(self) -> Outcome | None:
        """What has ended the start; None while it goes on."""
        self._look()
        code = self._process.poll()
        if code is None:
            return self._hanging()
        if code == 0:
            stopped, signalled = (self._job.run_dir / name for name in (STOPPED, SIGNALLED))
            told = json.loads(signalled.read_text()) if signalled.exists() else None
            by_rank = (told["rank"], told["signal"]) if told else None
            return Outcome("stopped" if stopped.exists() else "done", by_rank=by_rank)
        time.sleep(_LOOK)  # the ranks' last words may be on their way to the disk
        failures = self._failures()
        said = lines_since(self._log, self._log_start)
        why = f"{self._job.cluster.launcher} ended with status {code}" + (
            f": {said[-1].strip()}" if said else ""
        )
        return Outcome("failed", failures, why=why)

    def _hanging(self) -> Outcome | None:
        limit = self._job.cluster.hang_timeout
        if not self._pulses.hangs(limit) or time.monotonic() < self._next_stacks:
            return None
        stacks, busy = self._stacks()
        if self._pulses.works(limit, stacks, busy):
            self._next_stacks = time.monotonic() + limit / 2
            return None
        return Outcome("hang", suspect=self._pulses.suspect(stacks))

    def _look(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK
        for rank in range(self._layout.ranks):
            beat = heartbeat.read_beat(self._hearts, rank)
            if beat is None:
                continue
            state = process_state(beat.pid) if self._here else ""
            self._pulses.take(rank, beat.step, beat.count, state)

    def _failures(self) -> list[Failure]:
        found = [read_failure(self._job.run_dir, rank) for rank in range(self._layout.ranks)]
        told = [self._placed(failure) for failure in found if failure is not None]
        printed = "\n".join(lines_since(self._log, self._log_start)[-200:])
        match = _SIGNAL.search(printed)
        rank = self._named(printed)
        if match and rank is not None and all(failure.is_consequence for failure in told):
            number = int(next(filter(None, match.groups())))
            told.append(self._placed(killed(rank, -number)))
        return told

    def _placed(self, failure: Failure) -> Failure:
        """With what agents add elsewhere: the node, and the last lines of the log."""
        lines = tuple(last_lines(rank_log(self._job.run_dir, failure.rank)))
        return replace(failure, lines=lines, host=self._layout.node_of(failure.rank).name)

    def _named(self, printed: str) -> int | None:
        """The rank whose end mpiexec tells: by number, or by its process."""
        if match := _RANK.search(printed):
            return int(match[1])
        pids = set(map(int, _PID.findall(printed)))
        for rank in range(self._layout.ranks):
            beat = heartbeat.read_beat(self._hearts, rank)
            if beat is not None and beat.pid in pids:
                return rank
        return None

    def _stacks(self) -> tuple[dict[int, list[str]], list[int]]:
        """Innermost frames of the ranks on this machine, and those at work; others cannot be asked under mpiexec."""
        if not self._here:
            return {}, []
        beats = {rank: heartbeat.read_beat(self._hearts, rank) for rank in self._pulses.ranks}
        pids = {
            rank: beat.pid
            for rank, beat in beats.items()
            if beat is not None and _is_of_run(beat.pid, self._job.run_dir)
        }
        return ask_for_stacks(self._job.run_dir, pids)

    def stop_ranks(self) -> None:
        """Have all ranks save at the same step and leave."""
        (self._job.run_dir / STOP).touch()

    def end(self, politely: bool) -> None:
        """End mpiexec and, through it, all ranks: politely, then for certain."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=_POLITE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if self._here:
            for rank in self._pulses.ranks:
                beat = heartbeat.read_beat(self._hearts, rank)
                if beat is not None and _is_of_run(beat.pid, self._job.run_dir):
                    with suppress(ProcessLookupError):
                        os.kill(beat.pid, signal.SIGKILL)
        shutil.rmtree(self._hearts, ignore_errors=True)


def _is_of_run(pid: int, run_dir: Path) -> bool:
    """Whether a process is a rank of this run, and not one that has got the number since."""
    try:
        return f"XTRAIN_RUN_DIR={run_dir}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
