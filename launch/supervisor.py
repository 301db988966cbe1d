"""Watches one run from start to end: starts it, says what went wrong, starts it again, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from xtrain.base.errors import CheckpointError, ConfigError
from xtrain.base.run_folder import CHECKPOINTS, METRICS, STOPPED
from xtrain.launch.attempt import Agents, Outcome
from xtrain.launch.checkpoints import Source, make_newest_whole, prune, usable
from xtrain.launch.checks import address_of_first, what_is_wrong
from xtrain.launch.failure import Failure, culprit, rank_log
from xtrain.launch.incidents import Clock, Incident, goodput, last_step, read_incidents, write_incident
from xtrain.launch.job import Job
from xtrain.launch.nodes import Layout, Node, place
from xtrain.launch.processes import signal_name
from xtrain.launch.progress import ProgressDisplay, RecordTail

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
_LONGEST_DELAY = 300.0
_PRUNE = 5.0
"""Seconds between two looks for checkpoints that need not be kept."""


@dataclass
class _Stop:
    """What the user or the system asked for: `requests` counts a signal that was repeated; `since`: the first."""

    requests: int = 0
    since: float = 0.0
    signals: list[int] = field(default_factory=list)

    def ask(self, number: int, _: Any) -> None:
        self.signals.append(number)
        self.requests = max(self.signals.count(n) for n in self.signals if n in (signal.SIGINT, signal.SIGTERM, number))
        if len(self.signals) == 1:
            self.since = time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether the run is to end."""
        return bool(self.signals)

    @property
    def warned(self) -> bool:
        """Whether the scheduler has said that the time slot ends."""
        return signal.SIGUSR1 in self.signals


@contextmanager
def _catching_signals(stop: _Stop) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    previous = {number: signal.signal(number, stop.ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclass
class _Nodes:
    """Which nodes take part: failures of each, and those that do not answer."""

    job: Job
    failures: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def fail(self, name: str | None) -> bool:
        """Count a failure of a node; whether it is left out from now on."""
        if name is None or len(self.job.nodes) == 1:
            return False
        self.failures[name] = self.failures.get(name, 0) + 1
        if self.failures[name] < self.job.cluster.node_failures:
            return False
        rest = [node for node in self.usable() if node.name != name]
        return len(rest) >= self.job.min_nodes and self.job.ranks_with(sum(node.slots for node in rest)) > 0

    def usable(self) -> list[Node]:
        """Those that have not failed too often; all of them where the others would not do."""
        limit = self.job.cluster.node_failures
        good = [node for node in self.job.nodes if self.failures.get(node.name, 0) < limit]
        enough = len(good) >= self.job.min_nodes and self.job.ranks_with(sum(node.slots for node in good)) > 0
        return good if enough else list(self.job.nodes)


class Supervisor:
    """Runs a job; `run()` returns the exit status for the command line."""

    def __init__(self, job: Job, console: Console, debug: bool) -> None:
        self.job, self.console, self.debug = job, console, debug
        self._clock = Clock(job.run_dir)
        self._nodes = _Nodes(job)
        self._stop = _Stop()
        self._source = job.source
        self._layout = Layout(())
        self._first = True
        self._tail = RecordTail(job.run_dir / METRICS)
        self._display = ProgressDisplay(console, job.total_steps, job.model)
        self._next_prune = self._next_probe = 0.0
        self._probe: Agents | None = None
        self._fruitless = 0
        self._newest: str | None = None

    def run(self) -> int:
        """Start the ranks, follow them, start them again as often as that helps, report."""
        with _catching_signals(self._stop):
            try:
                return self._run()
            finally:
                self._end_probe()
                self._display.close()

    def _run(self) -> int:
        while True:
            outcome = self._start_once()
            if outcome.kind == "done":
                self._summarise()
                return 0
            if outcome.kind == "killed":
                return self._report_killed()
            if outcome.kind == "stopped" and (self._stop.asked or not self._layout_is_short()):
                return self._report_stopped()
            if outcome.kind != "stopped" and (status := self._after_failure(outcome)) is not None:
                self._summarise()
                return status
            if self._stop.asked:
                return self._report_stopped()

    # One start.

    def _start_once(self) -> Outcome:
        """One start of the ranks, from its agents to its end."""
        self._source = self._where_from()
        number = self._clock.starts + 1
        agents = Agents(self.job, self._nodes.usable())
        politely = False
        try:
            outcome = self._launch(agents, number) or self._follow(agents)
            politely = outcome.kind in ("done", "stopped")
        finally:
            agents.end(politely)
            self._display.update(self._tail.new_steps())
        names = [node.name for node in self._layout.nodes]
        self._clock.ended(self._layout.ranks, names, outcome.kind)
        return outcome

    def _launch(self, agents: Agents, number: int) -> Outcome | None:
        """Start the ranks on the nodes that answer; an outcome when that was not to be."""
        cluster = self.job.cluster
        patience = cluster.start_timeout if self._first else min(cluster.start_timeout, 2.0 * cluster.ssh.connect_timeout)
        absent = agents.gather(patience, lambda: self._stop.asked)
        if self._stop.asked:
            return Outcome("stopped")
        hellos = {name: channel.hello or {} for name, channel in agents.channels.items()}
        wrong = what_is_wrong(self.job, hellos)
        if self._first and (absent or wrong):
            raise ConfigError(next(iter((absent | wrong).values())))
        for name in wrong:
            agents.drop(name)
        self._nodes.absent = absent | wrong
        present = [node for node in self._nodes.usable() if node.name in agents.channels]
        ranks = self.job.ranks_with(sum(node.slots for node in present))
        if not ranks or len(present) < self.job.min_nodes:
            return Outcome("failed", lost=self._nodes.absent)
        self._layout = place(present, ranks)
        for node in present:
            if node not in self._layout.nodes:
                agents.drop(node.name)
        self._first = False
        if ranks < self.job.ranks:
            self._say(f"going on with {ranks} of {self.job.ranks} ranks, on {', '.join(n.name for n in self._layout.nodes)}")
        self.job = self._job_from_source()
        agents.job = self.job
        agents.launch(self._layout, number, address_of_first(self.job, self._layout, hellos), lambda: self._stop.asked)
        return Outcome("stopped") if self._stop.asked else None

    def _job_from_source(self) -> Job:
        from dataclasses import replace

        return replace(self.job, source=self._source)

    def _where_from(self) -> Source | None:
        """What the next start continues from: what this run has saved, else what the user said."""
        own = self.job.run_dir / CHECKPOINTS
        if own.is_dir() and not (self._first and self.job.source is not None and self.job.source.tag is not None):
            tag, damage = make_newest_whole(own)
            for sentence in damage:
                self._note(Incident("checkpoint", self._clock.starts, sentence, action=f"continues from {tag}"))
                self._say(f"{sentence}; it is put aside", "red")
            self._newest = tag
            if tag is not None and (not self._first or self.job.source is None or self.job.source.folder == own):
                return Source(own, tag) if not self._first or self.job.source is not None else None
        if self.job.source is None:
            return None
        source, damage = usable(self.job.source)
        for sentence in damage:
            self._say(f"{sentence}; continuing from {source.tag}", "red")
        return source

    def _layout_is_short(self) -> bool:
        return self._layout.ranks < self.job.ranks

    def _follow(self, agents: Agents) -> Outcome:
        """Until the ranks have ended, or have to be."""
        told = growing = False
        while (outcome := agents.poll()) is None:
            self._display.update(self._tail.new_steps())
            if self._stop.asked and not told:
                told = True
                agents.stop_ranks()
                self._say(
                    "stopping: ranks finish the step and save a checkpoint (Ctrl-C again kills them now)"
                )
            late = self._stop.asked and time.monotonic() - self._stop.since > self.job.cluster.stop_timeout
            if self._stop.requests > 1 or late:
                return Outcome("killed")
            if not growing and not told and self._a_node_is_back():
                growing = True
                agents.stop_ranks()
            self._prune()
            time.sleep(0.05)
        return outcome

    def _prune(self) -> None:
        if self.job.keep is not None and time.monotonic() > self._next_prune:
            self._next_prune = time.monotonic() + _PRUNE
            folder = self.job.run_dir / CHECKPOINTS
            if folder.is_dir():
                prune(folder, self.job.keep)

    # Nodes that come back.

    def _a_node_is_back(self) -> bool:
        """Whether missing nodes answer again, with which there would be more ranks."""
        interval = self.job.cluster.rejoin_interval
        if not interval or not self._layout_is_short():
            return False
        if self._probe is None:
            if time.monotonic() < self._next_probe:
                return False
            missing = [node for node in self._nodes.usable() if node not in self._layout.nodes]
            if not missing:
                return False
            self._probe = Agents(self.job, missing)
            self._probe_until = time.monotonic() + 2.0 * self.job.cluster.ssh.connect_timeout
        self._probe._take_events()
        channels = list(self._probe.channels.values())
        if any(c.hello is None and not c.closed for c in channels) and time.monotonic() < self._probe_until:
            return False
        hellos = {c.node.name: c.hello for c in channels if c.hello is not None and not c.closed}
        self._end_probe()
        self._next_probe = time.monotonic() + interval
        good = set(hellos) - set(what_is_wrong(self.job, hellos))
        back = [node for node in self.job.nodes if node.name in good]
        if self.job.ranks_with(sum(n.slots for n in [*back, *self._layout.nodes])) <= self._layout.ranks:
            return False
        names = ", ".join(node.name for node in back)
        self._say(f"{names} answers again: ranks save, and go on with more")
        self._note(
            Incident("growth", self._clock.starts + 1, f"{names} answers again", step=last_step(self.job.run_dir),
                     action="saves and starts with more ranks")
        )  # fmt: skip
        return True

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.end(politely=False)
            self._probe = None

    # After a start.

    def _after_failure(self, outcome: Outcome) -> int | None:
        """Say what went wrong; the exit status when the run ends with it, None when it is to be started again."""
        failure = culprit(outcome.failures)
        if failure is not None and failure.user_error and not outcome.lost:
            self._say(f"xtrain: error: {failure.message}", "red")
            if self.debug and failure.traceback:
                self._say(failure.traceback)
            return failure.exit_code
        incident, node = self._judge(outcome, failure)
        left_out = self._nodes.fail(node)
        newest = self._newest_tag()
        self._fruitless = 1 if newest != self._newest else self._fruitless + 1
        again = self._fruitless <= self.job.max_restarts and not self._stop.asked
        delay = min(self.job.cluster.restart_delay * 2 ** (self._fruitless - 1), _LONGEST_DELAY)
        if again:
            action = f"starts again from {newest or 'the beginning'} in {delay:g} s"
        else:
            action = "ends"
        if left_out:
            action += f", without {node}, which has failed {self.job.cluster.node_failures} times"
        self._note(Incident(**{**vars(incident), "action": action}))
        self._tell(incident, failure, outcome)
        if not again:
            self._say_why_not()
            return 1
        self._say(f"{action} (start {self._clock.starts + 1})", "bold")
        self._wait(delay)
        return None

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._stop.asked:
            time.sleep(0.05)

    def _newest_tag(self) -> str | None:
        own = self.job.run_dir / CHECKPOINTS
        if not own.is_dir():
            return None
        from xtrain.checkpoint.contents import latest_tag

        try:
            return latest_tag(own)
        except CheckpointError:
            return None

    def _judge(self, outcome: Outcome, failure: Failure | None) -> tuple[Incident, str | None]:
        """The incident, and the node that it counts against."""
        start, step = self._clock.starts, last_step(self.job.run_dir)
        if outcome.kind == "hang":
            rank, cause = outcome.suspect
            node = self._layout.node_of(rank).name if rank is not None else None
            return Incident("hang", start, cause, node, rank, step), node
        if outcome.lost and (failure is None or failure.is_consequence or failure.host in outcome.lost):
            node, how = next(iter(outcome.lost.items()))
            return Incident("node", start, how, node, None, step), node
        assert failure is not None
        cause = ("" if failure.message.startswith(("was ", "exited ")) else "failed: ") + failure.message
        against = failure.host if failure.by_signal else None
        return Incident("rank", start, cause, failure.host, failure.rank, step, lines=list(failure.lines)), against

    def _note(self, incident: Incident) -> None:
        write_incident(self.job.run_dir, incident)

    # What the user reads.

    def _say(self, text: str, style: str | None = None) -> None:
        # No markup: messages hold what users wrote, brackets included.
        self.console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    def _tell(self, incident: Incident, failure: Failure | None, outcome: Outcome) -> None:
        self._say(f"{incident.sentence()}; all ranks were ended", "red")
        if self.debug and failure is not None and failure.traceback:
            self._say(failure.traceback)
        elif incident.lines:
            self._say("its last lines were:")
            for line in incident.lines:
                self._say(f"  {line}")
        if outcome.kind == "hang":
            self._say(f"Python stacks of all ranks that could write them are in {rank_log(self.job.run_dir, 0).parent}")
        elif incident.rank is not None:
            self._say(f"full log: {rank_log(self.job.run_dir, incident.rank)}")

    def _say_why_not(self) -> None:
        if self.job.max_restarts == 0 and not self.job.builtin:
            self._say(
                "not started again: say resume=auto (and cluster.max_restarts=N) if the script continues from its "
                "own checkpoints"
            )
        elif self.job.max_restarts:
            self._say(f"not started again: {self._fruitless} starts in a row have brought no new checkpoint")

    def _report_killed(self) -> int:
        if (self.job.run_dir / STOPPED).exists():
            self._say(f"ranks were killed after they had saved a checkpoint; {self._how_to_continue()}", "bold")
        elif (tag := self._newest_tag()) is not None:
            self._say(f"ranks were killed before they could save; {tag} is the newest checkpoint", "red")
        else:
            self._say("ranks were killed before they could save a checkpoint", "red")
        return INTERRUPTED

    def _how_to_continue(self) -> str:
        if self.job.builtin:
            return f"continue with: xtrain launch resume={self.job.run_dir}"
        return f"a checkpoint is in {self.job.run_dir / CHECKPOINTS}"

    def _report_stopped(self) -> int:
        if self._newest_tag() is None:
            self._say("stopped before there was anything to save", "bold")
        else:
            self._say(f"stopped; {self._how_to_continue()}", "bold")
        self._requeue()
        return INTERRUPTED

    def _requeue(self) -> None:
        """After Slurm's warning that the time slot ends."""
        job = os.environ.get("SLURM_JOB_ID")
        if not (self._stop.warned and job and self.job.cluster.slurm.requeue):
            return
        found = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if found.returncode:
            self._say(f"job {job} could not be queued again: {found.stderr.strip()}", "red")
        else:
            self._say(f"job {job} is queued again", "bold")

    def _summarise(self) -> None:
        incidents = [one for one in read_incidents(self.job.run_dir) if one["kind"] != "growth"]
        if not incidents:
            return
        kept, taken = goodput(self.job.run_dir)
        if taken:
            word = "incident" if len(incidents) == 1 else "incidents"
            self._say(
                f"{len(incidents)} {word} (incidents.jsonl); goodput {kept / taken:.0%}: {kept:.0f} of {taken:.0f} s became "
                "steps that were kept"
            )
            for one in incidents[-5:]:
                self._say(f"  start {one['start']}: {one['what']}; {one['action']}")


