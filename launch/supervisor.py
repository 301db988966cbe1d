"""Watches one run from start to end: starts it, says what went wrong, starts it again, and leaves nothing behind."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from xtrain.base.errors import ConfigError
from xtrain.base.run_folder import CHECKPOINTS, METRICS
from xtrain.launch.agents import Agents
from xtrain.launch.checkpoints import Source, make_newest_whole, newest_tag, prune, usable
from xtrain.launch.checks import address_of_first, what_is_wrong
from xtrain.launch.command import CommandStart
from xtrain.launch.failure import Failure, culprit
from xtrain.launch.incidents import Clock, Incident, last_step, write_incident
from xtrain.launch.job import Job
from xtrain.launch.launchers.slurm import requeue
from xtrain.launch.membership import Lookout, Membership
from xtrain.launch.nodes import Layout, place
from xtrain.launch.progress import ProgressDisplay, RecordTail
from xtrain.launch.report import Report
from xtrain.launch.start import Outcome, Start
from xtrain.launch.stopping import Stop, catching

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it (128 + SIGINT)."""
_LONGEST_DELAY = 300.0
_PRUNE = 5.0
"""Seconds between two looks for checkpoints that need not be kept."""


class Supervisor:
    """Runs a job; `run()` returns the exit status for the command line.

    Args:
        again: the ranks have been started before, so that nodes which are missing now are no mistake in the settings.
    """

    def __init__(self, job: Job, console: Console, debug: bool, again: bool = False) -> None:
        self.job = job
        self._report = Report(job, console, debug)
        self._clock = Clock(job.run_dir)
        self._members = Membership(job)
        self._lookout = Lookout(job, self._members)
        self._stop = Stop()
        self._layout = Layout(())
        self._started, self._growing = again, False
        self._tail = RecordTail(job.run_dir / METRICS)
        self._display = ProgressDisplay(console, job.total_steps, job.model)
        self._next_prune = 0.0
        self._fruitless = 0
        self._newest = newest_tag(self._own)

    @property
    def _own(self) -> Path:
        return self.job.run_dir / CHECKPOINTS

    def run(self) -> int:
        """Start the ranks, follow them, start them again as often as that helps, report."""
        with catching(self._stop):
            try:
                return self._run()
            finally:
                self._lookout.close()
                self._display.close()

    def _run(self) -> int:
        while True:
            outcome = self._start_once()
            if outcome.kind == "done":
                self._report.summary()
                return 0
            if outcome.kind == "killed":
                self._report.killed()
                return INTERRUPTED
            if outcome.kind in ("failed", "hang") and (status := self._after_failure(outcome)) is not None:
                self._report.summary()
                return status
            if self._stop.asked or (outcome.kind == "stopped" and not self._goes_on(outcome)):
                self._report.stopped()
                requeue(self.job, self._stop.warned, self._report.say)
                return INTERRUPTED

    def _goes_on(self, outcome: Outcome) -> bool:
        """After ranks have saved and left without the user's asking: whether they are started again."""
        if self._growing:
            return True
        if outcome.by_rank is None and not outcome.by_node:
            return False  # somebody has made the stop file
        again = self.job.max_restarts > 0
        start, step = self._clock.starts, last_step(self.job.run_dir)
        if outcome.by_rank is not None:
            rank, name = outcome.by_rank
            node = self._layout.node_of(rank).name
            incident = Incident(
                "signal", start, f"has received {name}, and all ranks have saved", node, rank, step
            )
        else:
            node, name = next(iter(outcome.by_node.items()))
            incident = Incident(
                "signal", start, f"has received {name}, and all ranks have saved", node, None, step
            )
        self._note(replace(incident, action="starts again" if again else "the run ends"))
        self._report.say(f"{incident.sentence()}{'; they are started again' if again else ''}", "red")
        return again

    # One start.

    def _start_once(self) -> Outcome:
        """One start of the ranks, to its end."""
        self._growing = False
        job = replace(self.job, source=self._where_from())
        number = self._clock.begins()
        if job.cluster.launcher in ("mpi", "sunway"):
            self._layout = place(job.nodes)
            outcome = self._follow(CommandStart(job, self._layout, number))
        else:
            outcome = self._with_agents(job, number)
        self._started = True
        self._display.update(self._tail.new_steps())
        self._next_prune = 0.0
        self._prune()
        self._clock.ends(self._layout.ranks, [node.name for node in self._layout.nodes], outcome.kind)
        return outcome

    def _with_agents(self, job: Job, number: int) -> Outcome:
        agents = Agents(job, self._members.usable())
        try:
            early = self._launch(agents, number)
        except BaseException as error:
            agents.end(politely=False)
            if self._started and isinstance(error, ConfigError):
                return Outcome("failed", why=str(error))  # a node that has gone meanwhile; it is tried again
            raise
        if early is not None:
            agents.end(politely=False)
            return early
        return self._follow(agents)

    def _launch(self, agents: Agents, number: int) -> Outcome | None:
        """Start the ranks on the nodes that answer; an outcome when that was not to be."""
        cluster, first = self.job.cluster, not self._started
        patience = (
            cluster.start_timeout if first else min(cluster.start_timeout, 2.0 * cluster.ssh.connect_timeout)
        )
        absent = agents.gather(patience, lambda: self._stop.asked)
        if self._stop.asked:
            return Outcome("stopped")
        hellos = agents.hellos()
        wrong = absent | what_is_wrong(self.job, hellos)
        if first and wrong:
            raise ConfigError(next(iter(wrong.values())))
        layout = self._members.layout(
            [node for node in self.job.nodes if node.name in hellos and node.name not in wrong]
        )
        if layout is None:
            return Outcome("failed", lost=wrong, why="too few nodes answer")
        for name in list(agents.channels):
            if name not in [node.name for node in layout.nodes]:
                agents.drop(name)
        self._layout = layout
        if layout.ranks < self.job.ranks:
            names = ", ".join(node.name for node in layout.nodes)
            self._report.say(f"going on with {layout.ranks} of {self.job.ranks} ranks, on {names}")
        agents.launch(layout, number, address_of_first(self.job, layout, hellos), lambda: self._stop.asked)
        return Outcome("stopped") if self._stop.asked else None

    def _where_from(self) -> Source | None:
        """What the next start continues from: what this run has saved, else what the user said."""
        said = self.job.source
        source: Source | None
        if not self._started and (said is None or said.folder != self._own or said.tag is not None):
            if said is None:
                return None
            source, damage = usable(said)
        else:
            tag, damage = make_newest_whole(self._own)
            source = Source(self._own, tag) if tag is not None else None
            if source is None and said is not None and said.folder != self._own:
                source = usable(said)[0]
        for sentence in damage:
            action = f"continues from {source.tag}" if source is not None else "starts from the beginning"
            self._note(Incident("checkpoint", self._clock.starts, sentence, action=action))
            self._report.say(f"{sentence}; {action}", "red")
        return source

    def _follow(self, start: Start) -> Outcome:
        """Until the ranks have ended, or have to be."""
        told, politely = False, False
        try:
            while (outcome := start.poll()) is None:
                self._display.update(self._tail.new_steps())
                if not told and (self._stop.asked or self._grows()):
                    told = True
                    start.stop_ranks()
                    if self._stop.asked:
                        self._report.say(
                            "stopping: ranks finish the step and save a checkpoint (Ctrl-C again kills them now)"
                        )
                late = (
                    self._stop.asked and time.monotonic() - self._stop.since > self.job.cluster.stop_timeout
                )
                if self._stop.at_once or late:
                    return Outcome("killed")
                self._prune()
                time.sleep(0.05)
            politely = outcome.kind in ("done", "stopped")
            return outcome
        finally:
            start.end(politely)
            for sentence in start.troubles:
                self._report.say(sentence, "red")

    def _grows(self) -> bool:
        """Whether missing nodes answer again, with which the run is to go on."""
        names = self._lookout.back(self._layout)
        if names:
            action = "ranks save, and go on with more of them"
            incident = Incident(
                "growth",
                self._clock.starts,
                f"{', '.join(names)} answers again",
                step=last_step(self.job.run_dir),
            )
            self._note(replace(incident, action=action))
            self._report.say(f"{incident.sentence()}: {action}")
            self._growing = True
        return bool(names)

    def _prune(self) -> None:
        if self.job.keep is not None and time.monotonic() > self._next_prune:
            self._next_prune = time.monotonic() + _PRUNE
            prune(self._own, self.job.keep)

    # After a start.

    def _after_failure(self, outcome: Outcome) -> int | None:
        """Say what went wrong; the exit status when the run ends with it, None when it is to be started again."""
        failure = culprit(outcome.failures)
        if failure is not None and failure.user_error and not outcome.lost:
            return self._report.user_error(failure)
        incident, node = self._judge(outcome, failure)
        left_out = self._members.fail(node)
        newest = newest_tag(self._own)
        self._fruitless, self._newest = 1 if newest != self._newest else self._fruitless + 1, newest
        again = self._fruitless <= self.job.max_restarts and not self._stop.asked
        delay = min(self.job.cluster.restart_delay * 2 ** (self._fruitless - 1), _LONGEST_DELAY)
        action = f"starts again from {newest or 'the beginning'} in {delay:g} s" if again else "the run ends"
        if left_out:
            action += f", without {node}, which has failed {self.job.cluster.node_failures} times"
        self._note(replace(incident, action=action))
        self._report.incident(incident, failure)
        if not again:
            self._report.not_again(self._fruitless)
            return 1
        self._report.say(f"{action} (start {self._clock.starts + 1})", "bold")
        until = time.monotonic() + delay
        while time.monotonic() < until and not self._stop.asked:
            time.sleep(0.05)
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
        if failure is None:
            return Incident("start", start, outcome.why, None, None, step), None
        cause = ("" if failure.message.startswith(("was ", "exited ")) else "failed: ") + failure.message
        against = failure.host if failure.by_signal else None
        return Incident(
            "rank", start, cause, failure.host, failure.rank, step, lines=list(failure.lines)
        ), against

    def _note(self, incident: Incident) -> None:
        write_incident(self.job.run_dir, incident)
