"""What the user reads of a run, on the terminal."""

from __future__ import annotations

from rich.console import Console

from xtrain.base.run_folder import CHECKPOINTS, STOPPED
from xtrain.launch.checkpoints import newest_tag
from xtrain.launch.failure import Failure, rank_log
from xtrain.launch.incidents import Incident, goodput, read_incidents
from xtrain.launch.job import Job

_LISTED = 5
"""Incidents that the summary repeats."""


class Report:
    """Says things about a job."""

    def __init__(self, job: Job, console: Console, debug: bool) -> None:
        self._job, self._console, self._debug = job, console, debug

    def say(self, text: str, style: str | None = None) -> None:
        """One line. No markup: messages hold what users wrote, brackets included."""
        self._console.print(text, style=style, highlight=False, soft_wrap=True, markup=False)

    def user_error(self, failure: Failure) -> int:
        """A rank's sentence for the user; the exit status."""
        self.say(f"xtrain: error: {failure.message}", "red")
        self._traceback(failure)
        return failure.exit_code

    def _traceback(self, failure: Failure | None) -> None:
        if self._debug and failure is not None and failure.traceback:
            self.say(failure.traceback)

    def incident(self, incident: Incident, failure: Failure | None) -> None:
        """What has ended a start."""
        self.say(f"{incident.sentence()}; all ranks were ended", "red")
        self._traceback(failure)
        if incident.lines and not self._debug:
            self.say("its last lines were:")
            for line in incident.lines:
                self.say(f"  {line}")
        logs = rank_log(self._job.run_dir, 0).parent
        if incident.kind == "hang":
            self.say(f"Python stacks of all ranks that could write them are in {logs}")
        elif incident.rank is not None:
            self.say(f"full log: {rank_log(self._job.run_dir, incident.rank)}")

    def not_again(self, fruitless: int) -> None:
        """Why a run is not started again."""
        if self._job.max_restarts:
            self.say(f"not started again: {fruitless} starts in a row have brought no new checkpoint")
        elif not self._job.builtin and self._job.cluster.max_restarts is None:
            self.say("not started again: say resume=auto if the script continues from its own checkpoints")

    def stopped(self) -> None:
        """It was asked to stop, and has saved."""
        if newest_tag(self._job.run_dir / CHECKPOINTS) is None:
            self.say("stopped before there was anything to save", "bold")
        else:
            self.say(f"stopped; {self._how_to_continue()}", "bold")

    def killed(self) -> None:
        """The user did not wait for the ranks to save."""
        tag = newest_tag(self._job.run_dir / CHECKPOINTS)
        if (self._job.run_dir / STOPPED).exists():
            self.say(
                f"ranks were killed after they had saved a checkpoint; {self._how_to_continue()}", "bold"
            )
        elif tag is not None:
            self.say(f"ranks were killed before they could save; {tag} is the newest checkpoint", "red")
        else:
            self.say("ranks were killed before they could save a checkpoint", "red")

    def _how_to_continue(self) -> str:
        if self._job.builtin:
            return f"continue with: xtrain launch resume={self._job.run_dir}"
        return f"a checkpoint is in {self._job.run_dir / CHECKPOINTS}"

    def summary(self) -> None:
        """Of a run in which something went wrong: what, and what it has cost."""
        incidents = read_incidents(self._job.run_dir)
        kept, taken = goodput(self._job.run_dir)
        if not incidents or not taken:
            return
        count = f"{len(incidents)} incident{'' if len(incidents) == 1 else 's'}"
        self.say(
            f"{count} (incidents.jsonl); goodput {kept / taken:.0%}: {kept:.0f} of {taken:.0f} s became steps "
            "that were kept"
        )
        for one in incidents[-_LISTED:]:
            self.say(f"  start {one['start']}: {one['what']}; {one['action']}")
